"""Reward `multiple_choice`: which option a completion chooses, and when none."""

import time

import pytest

from plait.engine.types import ScoreStatus
from plait.rewards.multiple_choice import grade_multiple_choice

from .conftest import MakeScorer, make_prompt, score_texts

CHOICES = ["Rome", "Paris", "Berlin", "A dog"]


@pytest.mark.parametrize(
    ("completion", "with_choices", "without"),
    [
        (r"\boxed{B}", "B", "B"),
        (r"\boxed{\text{b}}", "B", "B"),
        (r"\boxed{A}, no: \boxed{(B)}", "B", "B"),
        (r"\boxed{Paris}", "B", ""),
        (r"\boxed{A, B}", "", ""),
        (r"\boxed{7} so (B)", "", ""),
        ("<answer>\nB. Paris\n</answer>", "B", "B"),
        ("I think (B)", "B", "B"),
        ("The answer is B because of that.", "B", "B"),
        ("the answer is (B).", "B", "B"),
        ("**Answer:** B", "B", "B"),
        ("**Answer: B**", "B", "B"),
        ("the answer is option B", "B", "B"),
        ("The correct option is B.", "B", "B"),
        ("Answer: B - Paris", "B", "B"),
        ("answer: A\nNo. The answer is B", "B", "B"),
        ("The answer is Paris", "B", ""),
        ("The answer is A dog", "D", ""),
        ("The answer is A cat", "", ""),
        ("The answer is not B", "", ""),
        ("The answer is B or C", "", ""),
        ("The answer is A, B", "", ""),
        ("long\n\nb", "B", "B"),
        ("**B**", "B", "B"),
        ("B.\n", "B", "B"),
        (" paris. ", "B", ""),
        ("B) Paris", "B", "B"),
        ("B) Rome", "", "B"),
        ("(A) is wrong, (B) is right", "", ""),
        ("B is right\nbecause of Rome", "", ""),
        ("Z", "", "Z"),
        ("", "", ""),
        ("\uff22", "", ""),
        ("\ud800", "", ""),
    ],
)
def test_the_chosen_letter(completion: str, with_choices: str, without: str) -> None:
    for metadata, letter in (({"choices": CHOICES}, with_choices), ({}, without)):
        score = grade_multiple_choice(make_prompt(answer="B", metadata=metadata), completion)
        assert (score.reward, score.answer) == (float(letter == "B"), letter)


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B.", "Paris", " PARIS ", "B) Paris"])
def test_forms_of_the_gold(answer: str) -> None:
    prompt = make_prompt(answer=answer, metadata={"choices": CHOICES})
    assert grade_multiple_choice(prompt, "B").reward == 1.0
    assert grade_multiple_choice(prompt, "C").reward == 0.0


@pytest.mark.parametrize(
    ("answer", "choices", "reason"),
    [
        (None, CHOICES, "no answer"),
        (" ", CHOICES, "no answer"),
        ("E", CHOICES, "neither a letter"),
        ("London", CHOICES, "neither a letter"),
        ("same", ["same", "Same", "other"], "exactly one"),
        ("B", ["B", "A"], "exactly one"),
        ("Paris", None, "neither a letter"),
        ("A", [], "no list"),
        ("A", ["x", 1], "no list"),
        ("A", ["x", " "], "no list"),
        ("A", "AB", "no list"),
        ("A", ["x"] * 27, "no list"),
    ],
)
def test_unknown(answer: str | None, choices, reason: str) -> None:
    metadata = {} if choices is None else {"choices": choices}
    score = grade_multiple_choice(make_prompt(answer=answer, metadata=metadata), "A")
    assert score.status is ScoreStatus.UNKNOWN
    assert reason in score.reason


@pytest.mark.parametrize(
    "piece", ["answer is ", "(", "(A) ", "*", " ", "A ", "B) *", "answer is B  ", "`"]
)
def test_long_texts_take_no_time(piece: str) -> None:
    prompt = make_prompt(answer="B", metadata={"choices": CHOICES})
    started = time.process_time()
    for text in (piece * 50_000, piece * 50_000 + "x", "answer is " + piece * 50_000 + "x"):
        grade_multiple_choice(prompt, text)
    assert time.process_time() - started < 3.0


def test_through_the_scorer(make_scorer: MakeScorer) -> None:
    prompt = make_prompt(answer="Paris", metadata={"choices": CHOICES})
    scores = score_texts(make_scorer("multiple_choice"), ["B", "Paris", "Rome", ""], prompt)
    assert [score.reward for score in scores] == [1.0, 1.0, 0.0, 0.0]
