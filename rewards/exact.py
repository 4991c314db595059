r"""Reward `exact`: 1 when the completion's answer is the prompt's, else 0.

The answer of a text is the content of its last \boxed{...}, or the whole text where there is none. Two answers are
equal when both are decimal numbers of the same value ("1,234.50" and "1234.5"), or when they are the same string after
stripping, collapsing white space and folding case. Fractions, units and LaTeX are strings here; use `math` for those.
The score's own `answer` is that string, of a number its shortest form.
"""

import re
from decimal import Context, Decimal

from ..engine.types import Prompt, Score
from .answers import last_boxed, plain

_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:(?<=\d)\.|\.\d+)?(?:[eE][+-]?\d{1,4})?")


def grade_exact(prompt: Prompt, completion: str) -> Score:
    """Score 1.0 or 0.0; UNKNOWN when the prompt has no answer."""
    if prompt.answer is None or not prompt.answer.strip():
        return Score.unknown("the prompt has no answer")
    gold, given = _answer(prompt.answer), _answer(completion)
    gold_number, given_number = _number(gold), _number(given)
    shown = given if given_number is None else _shortest(given_number)
    if gold_number is not None and given_number is not None:
        return Score.ok(gold_number == given_number, answer=shown)
    return Score.ok(gold == given, answer=shown)


def _answer(text: str) -> str:
    boxed = last_boxed(text)
    return " ".join(plain(text if boxed is None else boxed).split()).casefold()


def _number(text: str) -> Decimal | None:
    if not any(map(str.isdigit, text)) or not _NUMBER.fullmatch(text):
        return None
    return Decimal(text.replace(",", ""))


def _shortest(number: Decimal) -> str:
    """One string for all ways to write a number; no digit is rounded away."""
    digits = len(number.as_tuple().digits)
    return str(number.normalize(Context(prec=digits))) if number else "0"
