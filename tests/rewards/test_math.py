"""Reward `math`: agreement with math-verify, the extraction rule, and never a silent zero."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import math_verify
import pytest

from plait.engine.types import Prompt, ScoreStatus
from plait.rewards.answers import last_boxed, plain
from plait.rewards.math import grade_boxed_math, grade_math

from .conftest import MakeScorer, make_prompt, score_texts

PAIRS = [  # prompt's answer, completion, correct
    ("4", r"so it is \boxed{4}", True),
    ("4", r"so it is \boxed{5}", False),
    ("4", "The final answer is 4.", True),
    ("4", "answer: 4", True),
    ("4", "2 + 2 = 4", True),
    ("4", "first 4, but then 5", False),
    ("4", "I do not know", False),
    ("4", "", False),
    ("4", r"\boxed{}", False),
    ("1/2", r"\boxed{\frac{1}{2}}", True),
    ("1/2", r"\boxed{0.5}", True),
    ("1/2", r"\boxed{\dfrac12}", True),
    ("1/2", r"\boxed{\frac{1}{3}}", False),
    (r"\frac{3}{4}", "$\\frac{3}{4}$", True),
    (r"\frac{3}{4}", r"\boxed{3/4}", True),
    (r"2\sqrt{3}", r"\boxed{2\sqrt{3}}", True),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", True),
    (r"2\sqrt{3}", r"\boxed{2}", False),
    ("x^2+1", r"\boxed{1+x^2}", True),
    ("x^2+1", r"\boxed{x^2-1}", False),
    ("(x+1)^2", r"\boxed{x^2+2x+1}", True),
    ("1,234", r"\boxed{1234}", True),
    ("1234", r"\boxed{1,234}", True),
    ("-7", r"\boxed{-7}", True),
    ("-7", r"\boxed{7}", False),
    ("50%", r"\boxed{50\%}", True),
    (r"\{1,2,3\}", r"\boxed{\{3,2,1\}}", True),
    (r"\{1,2,3\}", r"\boxed{\{1,2\}}", False),
    ("[0,1)", r"\boxed{[0,1)}", True),
    ("[0,1)", r"\boxed{[0,1]}", False),
    (r"\pi", r"\boxed{\pi}", True),
    (r"\pi", r"\boxed{3}", False),
    ("x=5", r"\boxed{5}", True),
    ("5", r"\boxed{x=5}", True),
    (r"90^\circ", r"\boxed{90}", True),
    ("5", r"\boxed{5\text{ cm}}", True),
    ("10^{10}", r"\boxed{10000000000}", True),
    ("$12$", r"\boxed{12}", True),
    (r"so the sum is \boxed{12}", r"\boxed{12}", True),
    (
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}",
        True,
    ),
    (
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        r"\boxed{\begin{pmatrix}1&2\\3&5\end{pmatrix}}",
        False,
    ),
    (r"\infty", r"\boxed{\infty}", True),
    ("0.333333", r"\boxed{0.333333}", True),
]


@pytest.mark.parametrize(("answer", "completion", "correct"), PAIRS)
def test_verdicts_agree_with_math_verify(answer: str, completion: str, correct: bool) -> None:
    gold = math_verify.parse(rf"\boxed{{{last_boxed(answer) or answer}}}")
    assert math_verify.verify(gold, math_verify.parse(completion)) is correct
    assert grade_math(make_prompt(answer=answer), completion).reward == correct


@pytest.mark.parametrize(
    ("completion", "correct"),
    [
        (r"\boxed{4}, no: \boxed{5}", False),
        (r"\boxed{5}, no: \boxed{4}", True),
        (r"\boxed{4} and then cut off: \boxed{5", True),
        (r"\boxed{\boxed{4}}", True),
        ("\\\\boxed{4}", True),
        (r"the answer is 5. \boxed{4} The final answer is 5", True),
    ],
)
def test_the_last_closed_box_counts(completion: str, correct: bool) -> None:
    assert grade_math(make_prompt(), completion).reward == correct


@pytest.mark.parametrize("answer", [None, "", "   ", "???", "∞∞"])
def test_an_answer_that_cannot_be_parsed_is_unknown(answer: str | None) -> None:
    score = grade_math(make_prompt(answer=answer), r"\boxed{4}")
    assert score.status is ScoreStatus.UNKNOWN
    assert "answer" in score.reason


ANSWERS = [(str(n), rf"so \boxed{{{n}}}") for n in range(100, 200)]
ANSWERS += [(rf"\frac{{{n}}}{{7}}", rf"so \boxed{{{n}/7}}") for n in range(100, 200)]


def grade_pair(pair: tuple[str, str]) -> float | None:
    return grade_math(make_prompt(answer=pair[0]), pair[1]).reward


def test_200_answers_off_the_main_thread(measured: Callable[[str, str], None]) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(grade_pair, ANSWERS)) == [1.0] * 200
    measured("F23", "off the main thread: silent zeros 0/200, agreement 200/200")


def test_200_answers_in_asyncio(measured: Callable[[str, str], None]) -> None:
    async def grade_all() -> list[float | None]:
        off = await asyncio.gather(*(asyncio.to_thread(grade_pair, p) for p in ANSWERS[:100]))
        return [*off, *map(grade_pair, ANSWERS[100:])]

    assert asyncio.run(grade_all()) == [1.0] * 200
    measured("F23", "in asyncio: silent zeros 0/200")


def test_through_the_scorer(make_scorer: MakeScorer) -> None:
    scorer = make_scorer("math", timeout_seconds=2.0)
    bomb = r"\boxed{9^{9^{9^9}}}"
    scores = score_texts(scorer, [r"\boxed{4}", bomb, "none", r"\boxed{\frac{8}{2}}"])
    assert [score.reward for i, score in enumerate(scores) if i != 1] == [1.0, 0.0, 1.0]
    assert scores[1].reward != 1.0


def test_last_boxed_and_plain() -> None:
    assert last_boxed("no box") is None
    assert last_boxed(r"\boxed {a\}b}") == r"a\}b"
    assert last_boxed(r"\boxed{\left\{ x \right.}") == r"\left\{ x \right."
    assert last_boxed("} {" + r"\boxed{1}") == "1"
    assert last_boxed(r"\boxed{" * 50_000) is None
    assert plain(r" \text{Paris} ") == "Paris"
    assert plain(r"\text{a} b") == r"\text{a} b"


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("so \\boxed{4}", 1.0),
        ("\\boxed{5} no: \\boxed{4}", 1.0),
        ("the final answer is 4", 0.0),
        ("\\boxed{4", 0.0),
        ("", 0.0),
    ],
)
def test_boxed_math_takes_boxes_only(completion: str, reward: float) -> None:
    prompt = Prompt("p", (), (), answer="4")
    assert grade_boxed_math(prompt, completion).reward == reward
    assert grade_boxed_math(Prompt("p", (), ()), completion).reward is None


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"\boxed{0.5}", "1/2"),
        (r"\boxed{\dfrac12}", "1/2"),
        (r"\boxed{\frac{1}{3}}", "1/3"),
        (r"\boxed{1/3}", "1/3"),
        (r"\boxed{1+x^2}", "x**2 + 1"),
        (r"\boxed{\{3,2\}}", "{2, 3}"),
        (r"\boxed{" + "9" * 5000 + "}", "9" * 5000),
        ("I do not know", ""),
        ("", ""),
    ],
)
def test_the_answer_is_one_string_for_all_ways_to_write_it(completion: str, answer: str) -> None:
    assert grade_math(make_prompt(answer="1/2"), completion).answer == answer
    without_box = "" if "boxed" not in completion else answer
    assert grade_boxed_math(make_prompt(answer="1/2"), completion).answer == without_box
    assert grade_math(make_prompt(answer="???"), completion).answer is None
