"""What `plait probe` measured of each training prompt: a JSONL file that it writes, and that `data.probe` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..engine.errors import ConfigError, DataError

Reach = Literal["solved", "learnable", "out_of_reach", "unknown"]
REACHES: tuple[Reach, ...] = ("solved", "learnable", "out_of_reach", "unknown")


@dataclass(frozen=True, slots=True)
class Rate:
    """Rollouts of one prompt by the start model.

    >>> Rate(scored=8, right=0, unknown=0, has_demonstration=True).reach
    'out_of_reach'
    """

    scored: int
    """With a known score."""
    right: int
    unknown: int
    has_demonstration: bool

    @property
    def reach(self) -> Reach:
        """solved and out_of_reach: every score is known, and right or wrong. unknown: those that are known agree, and
        there are others, or there are none.
        """
        if 0 < self.right < self.scored:
            return "learnable"
        if self.unknown or not self.scored:
            return "unknown"
        return "solved" if self.right else "out_of_reach"

    @property
    def is_failed(self) -> bool:
        """There are known scores, and none is right."""
        return self.scored > 0 and not self.right

    def to_row(self, prompt_id: str) -> dict[str, Any]:
        return {"id": prompt_id, **asdict(self), "class": self.reach}


def read_rates(path: Path) -> dict[str, Rate]:
    """Prompt id -> its rate. Raises ConfigError where there is no such file, DataError naming file and line."""
    if not path.is_file():
        raise ConfigError.at(
            "data.probe", str(path), "no such file; `plait probe` writes it: FOLDER/rates.jsonl"
        )
    found: dict[str, Rate] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            name, rate = parse_rate(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"{path}:{number}: no row of a probe ({error}); give the same `plait probe` again to finish it"
            ) from error
        if name in found:
            raise DataError(f"{path}:{number}: prompt {name!r} is there twice; remove one line")
        found[name] = rate
    if not found:
        raise DataError(f"{path}: it holds no prompt")
    return found


def parse_rate(row: Any) -> tuple[str, Rate]:
    """Raises ValueError where the row is none."""
    names = {"id", "scored", "right", "unknown", "has_demonstration", "class"}
    if not isinstance(row, Mapping) or set(row) != names:
        raise ValueError(f"it must hold {', '.join(sorted(names))}")
    rate = Rate(row["scored"], row["right"], row["unknown"], row["has_demonstration"])
    counts = rate.scored, rate.right, rate.unknown
    if not all(type(n) is int and n >= 0 for n in counts) or rate.right > rate.scored:
        raise ValueError(f"scored, right and unknown are {counts}")
    if row["class"] != rate.reach:
        raise ValueError(f"class is {row['class']!r}, its counts say {rate.reach!r}")
    return row["id"], rate
