"""Reward `numeric`: how numbers are found, written and compared."""

import random
import time
from fractions import Fraction

import pytest

from plait.engine.types import ScoreStatus
from plait.rewards.numeric import grade_numeric, read_number

from .conftest import MakeScorer, make_prompt, score_texts


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\boxed{1,234.5}", "1234.5"),
        ("1{,}234", "1234"),
        (r"so 1\,234,567", "1234567"),
        ("12\u202f345", "12345"),
        ("-5", "-5"),
        ("+5", "5"),
        ("\u22125", "-5"),
        ("7-5", "5"),
        ("a = 7 - 5", "5"),
        ("answer: - 5", "-5"),
        (r"\boxed{- 5}", "-5"),
        ("1/3", "1/3"),
        (r"\frac{1}{3}", "1/3"),
        (r"\boxed{-\dfrac{1}{3}}", "-1/3"),
        (r"\frac13", "1/3"),
        ("2 1/3", "7/3"),
        (r"2\frac{1}{3}", "7/3"),
        (r"2\frac13", "7/3"),
        ("-2 1/3", "-7/3"),
        ("1.5e-3", "0.0015"),
        (r"1.5 \times 10^{-3}", "0.0015"),
        ("2*10**3", "2000"),
        ("10^6", "1000000"),
        ("1e9999", str(10**999) + "0" * 9000),
        ("50%", "1/2"),
        (r"\boxed{12.5\%}", "1/8"),
        ("-$5", "-5"),
        (r"\$5.", "5"),
        ("5 km", "5"),
        (".5", "1/2"),
        ("1,5", "5"),
        ("1,2345", "2345"),
        ("first 4, but then 5", "5"),
        ("#### 18\nmore: 7", "18"),
        ("The answer is 5 because 3 + 2", "5"),
        ("the answer is x = 7.", "7"),
        ("answer is 4. No, the answer is 6", "6"),
        ("the answer is unclear, 3?", "3"),
        ("**Answer:** 12", "12"),
        (r"The final answer is $\boxed{12}$ of 20", "12"),
        (r"the answer is 3 \boxed{4}", "4"),
    ],
)
def test_reading(text: str, value: str) -> None:
    number = read_number(text)
    assert number is not None
    assert number.value == (10**9999 if len(value) > 5000 else Fraction(value))


@pytest.mark.parametrize(
    "text", ["", "x2", "H2O", "1/0", "inf", "NaN", "9" * 1001, "1e99999", "²", "٣", r"\boxed{no} 4"]
)
def test_no_number(text: str) -> None:
    assert read_number(text) is None
    assert grade_numeric(make_prompt(), text).reward == 0.0
    assert grade_numeric(make_prompt(answer=text), "4").status is ScoreStatus.UNKNOWN


@pytest.mark.parametrize(
    ("gold", "given", "options", "right"),
    [
        ("4", "4.0", {}, True),
        ("4", "4.000001", {}, False),
        ("4", "4.04", {"relative_tolerance": 0.01}, True),
        ("4", "4.05", {"relative_tolerance": 0.01}, False),
        ("-4", "-4.04", {"relative_tolerance": 0.01}, True),
        ("0", "0.001", {"relative_tolerance": 1}, False),
        ("0", "0.001", {"absolute_tolerance": 0.0009}, False),
        ("0", "0.001", {"absolute_tolerance": 0.0011}, True),
        ("1/3", "0.3333", {"absolute_tolerance": 1e-3}, True),
        ("100000000", "100000001", {}, False),
        ("50", "50%", {}, True),
        ("0.5", "50%", {}, True),
        ("50%", "0.5", {}, True),
        ("50%", "50", {}, True),
        ("50%", "5000%", {}, False),
        ("3 + 4 = 7\n#### 7", r"\boxed{7}", {}, True),
    ],
)
def test_comparing(gold: str, given: str, options: dict[str, float], right: bool) -> None:
    assert grade_numeric(make_prompt(answer=gold), given, **options).reward == right


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "0.1", True, None])
def test_a_bad_tolerance_is_named(value) -> None:
    with pytest.raises(ValueError, match=r"option absolute_tolerance = .*at least 0"):
        grade_numeric(make_prompt(), "4", absolute_tolerance=value)


def test_every_way_to_write_a_number_is_the_same_number() -> None:
    draw = random.Random(0)
    for _ in range(300):
        n = draw.randrange(-(10**9), 10**9)
        forms = [str(n), f"{n:,}", f"{n}.0", rf"\boxed{{{n:,}}}", f"so 3 and {n}", f"#### {n}"]
        forms += [f"{2 * n}/2", rf"\frac{{{2 * n}}}{{2}}", f"{100 * n}%", f"{n}e0"]
        for form in forms:
            score = grade_numeric(make_prompt(answer=str(n)), form)
            assert (score.reward, score.answer) == (1.0, str(n)), form
            assert grade_numeric(make_prompt(answer=str(n + 1)), form).reward == 0.0, form


@pytest.mark.parametrize(
    "piece",
    [
        "1",
        "1,",
        "1,234",
        r"\frac{1",
        "answer is ",
        "-",
        "1 ",
        "1/",
        "10^",
        r"\boxed{",
        "1 1/1",
        ".1",
        "é",
    ],
)
def test_long_texts_take_no_time(piece: str) -> None:
    started = time.process_time()
    assert grade_numeric(make_prompt(), piece * (200_000 // len(piece))).reward is not None
    assert time.process_time() - started < 3.0


def test_the_answer() -> None:
    assert grade_numeric(make_prompt(answer="1"), "2 4/8").answer == "5/2"
    assert grade_numeric(make_prompt(answer="1/3"), "0.333", relative_tolerance=0.1).answer == "1/3"
    assert grade_numeric(make_prompt(answer="1"), "none").answer == ""


def test_through_the_scorer(make_scorer: MakeScorer) -> None:
    scores = score_texts(make_scorer("numeric"), ["4", r"\boxed{4.0}", "5", "\ud800", ""])
    assert [score.reward for score in scores] == [1.0, 1.0, 0.0, 0.0, 0.0]
