"""Reward `exact`: normalised strings and numbers."""

import pytest

from plait.engine.types import Score
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
    assert grade_exact(make_prompt(answer=answer), completion) == Score.ok(correct)


@pytest.mark.parametrize("answer", [None, " "])
def test_no_answer_is_unknown(answer: str | None) -> None:
    assert grade_exact(make_prompt(answer=answer), "").reason == "the prompt has no answer"
