r"""Reward `reasoning_gym`: the score that reasoning-gym's own data set gives to an answer, usually from 0 to 1.

`prompt.metadata["reasoning_gym"]` holds

    {"dataset": "chain_sum",                                       name registered in reasoning-gym
     "entry": {"question": ..., "answer": ..., "metadata": {...}}  the item as the data set produced it
     "config": {"num_terms": 3}}                                   optional: keyword arguments of create_dataset

"config" matters to the scorers that look at how their data set was configured (arc_agi, decimal_arithmetic,
polynomial_equations, puzzle24, rearc, time_intervals, word_ladder); without it the defaults apply. An item of
`composite` belongs to the data set that wrote it. A tuple that became a list on its way through JSON is no longer
equal to a tuple: arc_agi and rearc compare such values, so keep their entries as they were produced.

Items of boxnet, graph_color, propositional_logic, rubiks_cube and rush_hour have no answer, only a scorer that checks
one.

Extraction rule: content of the last closed \boxed{...}; else of the last <answer>...</answer>; else the whole
completion where the item's own answer has several lines; else the last line that is not empty. An answer whose braces
do not match (some of codeio's JSON texts) does not fit into a box: LaTeX counts them. With white space
collapsed, it is the score's own `answer`.

Nine scorers evaluate the answer as Python (`_EVALUATED`). There, an answer with anything but arithmetic, a plain list
or a formula is wrong and never reaches the scorer, which would run it.

Two scorers accept what is wrong, so more is asked: game_of_life_halting takes any text, here it is the item's own
word; puzzle24 takes any four numbers, here they are the item's.

Scorers differ in what they do with malformed answers: some give 0, some a little credit, some raise. One that raises
gives 0 here, provided that it accepts the item's own answer; otherwise the error stands and the score is UNKNOWN.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from reasoning_gym import create_dataset
from reasoning_gym.utils import extract_answer

from ..engine.types import Prompt, Score
from .answers import last_boxed, plain

_KEY = "reasoning_gym"
_ARITHMETIC = re.compile(r"[0-9+\-*/^().,=\s]*")
_LIST = re.compile(r"[^()]*")  # nothing runs without a call
_FORMULA = re.compile(
    r"(?:(?:a?(?:sin|cos|tan)h?|sec|csc|cot|exp|log|ln|sqrt|Abs|erf|[ESC]i|li|Integral|pi|[A-Za-z])(?![A-Za-z_])"
    r"|[0-9+\-*/^().,=\s])*"
)
_EVALUATED = {
    "binary_matrix": _LIST,
    "countdown": _ARITHMETIC,
    "intermediate_integration": _FORMULA,
    "n_queens": _LIST,
    "polynomial_multiplication": _FORMULA,
    "puzzle24": _ARITHMETIC,
    "simple_integration": _FORMULA,
    "spiral_matrix": _LIST,
    "string_insertion": _LIST,
}
"""Data sets whose scorer evaluates answers, and what an answer to them may look like."""
_MALFORMED = (ArithmeticError, AttributeError, LookupError, SyntaxError, TypeError, ValueError)


def grade_reasoning_gym(prompt: Prompt, completion: str) -> Score:
    """The data set's score; UNKNOWN when the metadata lacks a key or the data set cannot be created."""
    item = prompt.metadata.get(_KEY)
    if not isinstance(item, Mapping) or not {"dataset", "entry"} <= item.keys():
        return Score.unknown(f'the prompt has no metadata["{_KEY}"] with "dataset" and "entry"')
    entry = dict(item["entry"])
    score_answer = _scorer(item["dataset"], json.dumps(item.get("config") or {}, sort_keys=True))
    given = extract(completion, entry)
    shown = " ".join(given.split())
    if not _is_admissible(item["dataset"], given, entry):
        return Score.ok(0.0, answer=shown)
    try:
        return Score.ok(score_answer(given, entry), answer=shown)
    except _MALFORMED:
        score_answer(entry["answer"], entry)  # raises as well when it is not the answer's fault
        return Score.ok(0.0, answer=shown)


def extract(completion: str, entry: Mapping[str, Any]) -> str:
    """The answer inside `completion`, by the extraction rule above."""
    boxed = last_boxed(completion)
    if boxed is not None:
        return plain(boxed)
    tagged = extract_answer(completion)
    if tagged is not None:
        return tagged
    completion = completion.strip()
    if "\n" in str(entry.get("answer") or "").strip():
        return completion
    return completion.rpartition("\n")[2].strip()


def _is_admissible(dataset: str, given: str, entry: Mapping[str, Any]) -> bool:
    """Whether the data set's own scorer may see the answer."""
    form = _EVALUATED.get(dataset)
    if form is not None and not form.fullmatch(given):
        return False
    if dataset == "game_of_life_halting":
        return given.strip().casefold() == str(entry["answer"]).casefold()
    if dataset == "puzzle24":
        used = sorted(map(int, re.findall(r"[0-9]{1,9}", given)))
        return used == sorted(entry["metadata"]["numbers"])
    return True


@lru_cache(maxsize=256)
def _scorer(dataset: str, config: str) -> Callable[[str | None, dict[str, Any]], float]:
    """Creating a data set takes from a millisecond to half a second, so it happens once for each process."""
    return create_dataset(dataset, **json.loads(config)).score_answer
