"""Reward `format`: the default form, patterns of one's own, and no endless backtracking in the default."""

import time

import pytest

from plait.rewards.format import grade_format

from .conftest import make_prompt


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (r"<think>a</think>\boxed{1}", 1),
        ("\n<think>\na\n</think>\n\nso \\boxed{\\frac{1}{2}}.\n", 1),
        ("<think></think><answer>1</answer>", 1),
        ("<think>a</think>so <answer>\n1\n</answer> there", 1),
        (r"<think>a</think>\boxed{}", 0),
        (r"<think>a</think>\boxed{1", 0),
        ("<think>a</think><answer> </answer>", 0),
        ("<think>a</think>1", 0),
        (r"<think>\boxed{1}</think>", 0),
        (r"<think>\boxed{1}", 0),
        (r"x<think>a</think>\boxed{1}", 0),
        (r"<think>a<think>b</think>\boxed{1}", 0),
        (r"<think>a</think>\boxed{1}<think>b</think>", 0),
        (r"\boxed{1}", 0),
        ("", 0),
    ],
)
def test_the_default_form(completion: str, reward: float) -> None:
    assert grade_format(make_prompt(answer=None), completion).reward == reward


@pytest.mark.parametrize(
    ("pattern", "completion", "reward"),
    [
        ("a.b", "a\nb", 1),
        ("a", "ab", 0),
        ("(?i)A", "a", 1),
        ("", "", 1),
        (".*</think>.*", "x</think>y", 1),
    ],
)
def test_own_pattern(pattern: str, completion: str, reward: float) -> None:
    assert grade_format(make_prompt(), completion, pattern=pattern).reward == reward


@pytest.mark.parametrize("pattern", ["(", "[", 3, None])
def test_a_bad_pattern_is_named(pattern) -> None:
    with pytest.raises(ValueError, match=r"option pattern = .* is no regular expression"):
        grade_format(make_prompt(), "", pattern=pattern)


THOUGHT = "<think></think>"


@pytest.mark.parametrize(
    "text",
    [
        "<think>" * 100_000,
        THOUGHT * 60_000,
        THOUGHT + r"\boxed{" * 100_000,
        THOUGHT + r"\boxed{" + " " * 1_000_000,
        THOUGHT + "<answer>" * 100_000,
        THOUGHT + "<answer>x" + "</answer" * 100_000,
        " " * 1_000_000,
        "<think>" + "\ud800é" * 300_000,
    ],
)
def test_long_texts_take_no_time(text: str) -> None:
    started = time.process_time()
    assert grade_format(make_prompt(), text).reward == 0
    assert time.process_time() - started < 2.0
