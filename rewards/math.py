r"""Rewards `math` and `boxed_math`: 1 when the final expression equals the prompt's answer by math-verify, else 0.

Extraction rule. Of the completion: the last closed \boxed{...}; without one, what math-verify's default
configuration finds (an expression after "final answer is" or "answer:", else the last LaTeX or plain number). Of the
prompt's answer: its last \boxed{...}; else, where it contains $...$, \(...\) or \[...\], what math-verify finds in
it; else all of it. `boxed_math` takes a \boxed{...} only, for prompts that ask for one: an answer without it is wrong.

Nothing parsable in the completion is a wrong answer. An answer that cannot be parsed makes the score UNKNOWN: nobody
can be right or wrong against it. Words parse as products of letters ("lube" equals "blue"): use `exact` for those.

The score's own `answer`: of a right completion the prompt's answer, so that all ways to write it are one; of a wrong
one its expression as sympy prints it, "" where there is none.

math-verify's own time limits are switched off: they need SIGALRM, which works only on the main thread and cannot
interrupt a call into C, and an expired one reads as a wrong answer. The deadline of the scoring process is the
limit; called directly, this function works on any thread and may take as long as sympy takes.
"""

import re
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from ..engine.types import Prompt, Score
from .answers import last_boxed

_DELIMITED = re.compile(r"(?<!\\)\$|\\\(|\\\[")


def grade_math(prompt: Prompt, completion: str) -> Score:
    """Score 1.0 or 0.0; UNKNOWN when the prompt has no answer or one that math-verify cannot parse."""
    if prompt.answer is None:
        return Score.unknown("the prompt has no answer")
    gold = _parse_gold(prompt.answer)
    if all(isinstance(expression, str) for expression in gold):
        return Score.unknown(
            f"math-verify cannot parse the prompt's answer {prompt.answer[:100]!r}; "
            "correct it, or grade with `exact`"
        )
    boxed = last_boxed(completion)
    given = _parse(completion if boxed is None else rf"\boxed{{{boxed}}}")
    right = verify(gold, given, timeout_seconds=None)
    return Score.ok(right, answer=_text(gold if right else given))


def grade_boxed_math(prompt: Prompt, completion: str) -> Score:
    """As grade_math, but a completion without a closed \\boxed{...} is wrong."""
    score = grade_math(prompt, completion)
    if score.reward is not None and last_boxed(completion) is None:
        return Score.ok(0.0, answer="")
    return score


@lru_cache(maxsize=4096)
def _parse_gold(answer: str) -> list[Any]:
    boxed = last_boxed(answer)
    if boxed is None and _DELIMITED.search(answer):
        return _parse(answer)
    return _parse(rf"\boxed{{{answer if boxed is None else boxed}}}")


def _parse(text: str) -> list[Any]:
    """sympy expressions, then the extracted string itself; [] where nothing was found."""
    return parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]  (documented to take None)


def _text(parsed: list[Any]) -> str:
    """The expression in sympy's notation, else the extracted string, else ""."""
    for expression in parsed:
        try:
            return " ".join(str(expression).split())
        except (
            ValueError
        ):  # an integer of more digits than Python prints; the string comes after it
            continue
    return ""
