"""Reward `json_schema`: 1 when the completion's JSON is valid under the prompt's schema, else 0.

Extraction rule: the last closed Markdown block fenced as ```json, else the whole completion. It must be JSON as RFC
8259 has it: no NaN or Infinity, no number too large for a float64, no comments, nothing around it; and no name twice
in one object, no integer of more than 4300 digits, no nesting deeper than 64 levels. Anything else is wrong.

`prompt.metadata["schema"]` is the schema, of the draft that its "$schema" names, else of 2020-12; `true` accepts any
JSON. A "$ref" is followed inside the schema and to the published drafts, and nothing is ever fetched: one that leads
elsewhere makes the score UNKNOWN. "format" is an annotation, as the standard has it, and checks nothing.

Where `prompt.answer` is given, the JSON must also equal it: the order of names does not matter, 1 equals 1.0 and does
not equal true. The score's own `answer` is the JSON with sorted names and no white space, "" where there is none;
`parts` is {"valid": 1.0 or 0.0} where an answer is compared as well.

UNKNOWN where the schema is missing, no valid schema, or cannot be followed, and where the answer is no JSON.
"""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NoReturn

from jsonschema.exceptions import SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import Draft202012Validator, validator_for
from jsonschema_specifications import REGISTRY
from referencing.exceptions import Unresolvable

from ..engine.types import Prompt, Score
from .answers import last_block

MAX_DEPTH = 64


def grade_json_schema(prompt: Prompt, completion: str) -> Score:
    """Score 1.0 or 0.0; UNKNOWN when schema or answer of the prompt cannot be used."""
    schema = prompt.metadata.get("schema")
    if not isinstance(schema, Mapping | bool):
        return Score.unknown('the prompt has no metadata["schema"] that is a JSON schema')
    gold = None
    if prompt.answer is not None:
        try:
            gold = canonical(parse_json(prompt.answer))
        except ValueError as error:
            return Score.unknown(f"the prompt's answer is no JSON: {error}")
    block = last_block(completion, {"json"})
    try:
        value = parse_json(completion if block is None else block)
    except ValueError:
        return Score.ok(0.0, {} if gold is None else {"valid": 0.0}, answer="")
    try:
        valid = _validator(json.dumps(schema)).is_valid(value)
    except SchemaError as error:
        return Score.unknown(f'metadata["schema"] is no valid schema: {error.message[:300]}')
    except Unresolvable as error:
        return Score.unknown(f'metadata["schema"] has a $ref that is not inside it: {error.ref}')
    except RecursionError:
        return Score.unknown('metadata["schema"] refers to itself without end')
    shown = canonical(value)
    if gold is None:
        return Score.ok(valid, answer=shown)
    return Score.ok(valid and shown == gold, {"valid": float(valid)}, shown)


def parse_json(text: str) -> Any:
    """Strict JSON, by the rules above. Raises ValueError."""
    if _depth(text) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return json.loads(
        text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique
    )


def canonical(value: Any) -> str:
    """One string for all ways to write the same JSON value."""
    return json.dumps(_integers(value), sort_keys=True, separators=(",", ":"))


@lru_cache(maxsize=256)
def _validator(schema: str) -> Validator:
    parsed = json.loads(schema)
    kind = validator_for(parsed, default=Draft202012Validator)
    kind.check_schema(parsed)
    return kind(parsed, registry=REGISTRY)  # a registry that retrieves nothing


def _depth(text: str) -> int:
    """Greatest nesting of brackets outside strings."""
    depth = deepest = 0
    inside = escaped = False
    for char in text:
        if inside:
            inside = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            inside, escaped = True, False
        elif char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}":
            depth -= 1
    return deepest


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:50]} is too large")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a name twice")
    return found


def _integers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_integers(item) for item in value]
    if isinstance(value, dict):
        return {name: _integers(item) for name, item in value.items()}
    return value
