"""`quarantine.jsonl` of a run folder: every row of the data that the run does not use, with the reason.

One line a row:

    {"source": "rows.jsonl", "where": "line 7", "prompt_id": "rows.jsonl/7", "reason": "empty text: ...", "row": {...}}

`where` finds the row in its source; `row` is for reading, so long texts in it are cut.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypedDict

MAX_TEXT = 2000
"""Characters of one text of a row that are written."""


class Quarantined(TypedDict):
    """One row that is not used; prompt_id is None where the row has none that can be read."""

    source: str
    where: str
    prompt_id: str | None
    reason: str
    row: Any


def append(path: Path, rows: Iterable[Quarantined]) -> int:
    """Write rows that the file does not hold yet; returns how many.

    A resumed run finds the same rows again, so a row with the same source, place, id and reason is not repeated.
    """
    known = _read_keys(path)
    written = 0
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            key = _key(row)
            if key not in known:
                known.add(key)
                # Lone surrogates stay escaped: the file is always valid UTF-8.
                file.write(json.dumps({**row, "row": shorten(row["row"])}, default=str) + "\n")
                written += 1
    return written


def shorten(value: Any, limit: int = MAX_TEXT) -> Any:
    """The same value with every text cut after `limit` characters.

    >>> shorten({"prompt": "abcdef"}, 4)
    {'prompt': 'abcd... (2 more characters)'}
    """
    if isinstance(value, str) and len(value) > limit:
        return f"{value[:limit]}... ({len(value) - limit:,} more characters)"
    if isinstance(value, Mapping):
        return {str(key): shorten(item, limit) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shorten(item, limit) for item in value]
    return value


def _read_keys(path: Path) -> set[bytes]:
    if not path.exists():
        return set()
    known, end = set(), 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                known.add(_key(json.loads(line)))
                end += len(line)
    # A line without its end was torn by a crash: its row is written again.
    os.truncate(path, end)
    return known


def _key(row: Mapping[str, Any]) -> bytes:
    parts = [row["source"], row["where"], row["prompt_id"], row["reason"]]
    return blake2b(json.dumps(parts).encode(), digest_size=16).digest()
