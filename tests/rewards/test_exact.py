"""Reward `exact`: normalised strings and numbers."""

import pytest

from plait.rewards.exact import grade_exact

from .conftest import make_prompt


@pytest.mark.parametrize(
    ("answer", "completion", "correct"),
    [
        ("Paris", "Paris", True),
        ("Paris", "  paris\n", True),
        ("Paris", r"It is \boxed{Paris}.", True),
        ("Paris", r"\boxed{\text{Paris}}", True),
        ("Paris", r"\boxed{Rome} or \boxed{Paris}", True),
        ("Paris", "It is Paris.", False),
        ("New York", "new \n  york", True),
        ("straße", "STRASSE", True),
        ("1234.5", "1,234.50", True),
        ("1234", "+1234.", True),
        ("0.1", ".10", True),
        ("1e3", "1000", True),
        ("-0", "0", True),
        ("1,23", "123", False),
        ("12", "13", False),
        ("1/2", "0.5", False),
        ("nan", "NaN", True),
        ("5", "five", False),
        ("5", "", False),
        ("1e9999999999", "5", False),
        ("²", "2", False),
    ],
)
def test_verdicts(answer: str, completion: str, correct: bool) -> None:
    assert grade_exact(make_prompt(answer=answer), completion).reward == correct


@pytest.mark.parametrize("answer", [None, " "])
def test_no_answer_is_unknown(answer: str | None) -> None:
    assert grade_exact(make_prompt(answer=answer), "").reason == "the prompt has no answer"


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{\text{New  York}}", "new york"),
        ("1,234.50", "1234.5"),
        ("+1234.5", "1234.5"),
        ("1000", "1E+3"),
        ("1e3", "1E+3"),
        ("-0.00", "0"),
        ("1" * 40 + ".0", "1" * 40),
        ("1/2", "1/2"),
        ("", ""),
    ],
)
def test_the_answer_is_one_string_for_all_ways_to_write_it(completion: str, answer: str) -> None:
    for gold in ("1234.5", "other"):
        assert grade_exact(make_prompt(answer=gold), completion).answer == answer
