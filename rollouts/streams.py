"""Several streams drawn in turn, so that their weights hold over every stretch of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol, TypeGuard

import numpy as np

from ..engine.errors import DataError
from .attempts import Attempts


class Stream(Protocol):
    """Draws rows of range(n); `position` (and what was observed) decides what comes next."""

    position: int

    @property
    def epoch(self) -> int: ...

    def take(self, count: int, allowed: np.ndarray | None = None) -> list[int]: ...


@dataclass(frozen=True)
class PartStream:
    """One part of the data, and its order. Data without a mixture has one part without a name."""

    name: str
    weight: float
    rows: np.ndarray
    """Training prompts of the part, of which the stream draws by number."""
    stream: Stream


class MixedStream:
    """The next draw is of the part that is furthest behind its share: weight * (draws + 1) - draws of the part.

    A part is never a whole draw ahead of its share, so weights hold over every stretch. The state is the number of
    draws and the stream position of each part.
    """

    def __init__(self, parts: Sequence[PartStream], attempts: Attempts | None = None) -> None:
        total = sum(part.weight for part in parts)
        self._parts = parts
        self._weights = [part.weight / total for part in parts]
        self._attempts = attempts
        self._drawn = [0] * len(parts)
        self._ends = np.cumsum([len(part.rows) for part in parts])

    def shares(self, count: int) -> list[tuple[str, int, int]]:
        """Name, most draws of a take of `count`, and rows of each part.

        What one part is behind, less than a draw for each of the others, may all come in one take.
        """
        if not self._parts:
            return [("", count, 0)]
        alone = len(self._parts) == 1
        return [
            (part.name, count if alone else min(count, ceil(weight * count) + len(self._parts)), len(part.rows))
            for part, weight in zip(self._parts, self._weights, strict=True)
        ]  # fmt: skip

    def take(self, count: int) -> list[int]:
        """The next `count` rows, all different; `shares` says whether there are as many."""
        order = [self._next_part() for _ in range(count)]
        drawn = [
            iter(self._take_of(part, order.count(k)) if k in order else ())
            for k, part in enumerate(self._parts)
        ]
        return [next(drawn[k]) for k in order]

    def epoch_of(self, row: int) -> int:
        """Of the stream that draws this row."""
        return self._parts[int(np.searchsorted(self._ends, row, side="right"))].stream.epoch

    def rows_and_epochs(self) -> list[tuple[np.ndarray, int]]:
        return [(part.rows, part.stream.epoch) for part in self._parts]

    def state_dict(self) -> dict[str, Any]:
        return {
            "drawn": list(self._drawn),
            "positions": [part.stream.position for part in self._parts],
        }

    def load_state_dict(self, state: Any) -> None:
        """Raises DataError where it is no state of as many parts."""
        drawn, positions = (
            (state.get("drawn"), state.get("positions")) if isinstance(state, dict) else (0, 0)
        )
        if not (self._is_counts(drawn) and self._is_counts(positions)):
            raise DataError(f"not a state of this data source: {state}")
        self._drawn = list(drawn)
        for part, position in zip(self._parts, positions, strict=True):
            part.stream.position = position

    def _next_part(self) -> int:
        nth = sum(self._drawn) + 1
        behind = [w * nth - n for w, n in zip(self._weights, self._drawn, strict=True)]
        chosen = behind.index(max(behind))
        self._drawn[chosen] += 1
        return chosen

    def _take_of(self, part: PartStream, count: int) -> list[int]:
        allowed = None
        if self._attempts is not None:
            allowed = self._attempts.active(part.rows, part.stream.epoch)
            if allowed is not None and int(allowed.sum()) < count:
                self._attempts.rejoin(part.rows)
                allowed = None
        return part.rows[part.stream.take(count, allowed)].tolist()

    def _is_counts(self, values: object) -> TypeGuard[list[int]]:
        return (
            isinstance(values, list)
            and len(values) == len(self._parts)
            and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in values)
        )
