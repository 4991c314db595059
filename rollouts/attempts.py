"""What the run has observed of each training prompt: success rates, and which prompts are retired.

A visit is a prompt's own attempt in a step: its first rollouts without a forced prefix and without a hint. A rollout is
correct from a reward of 1 on; one whose score is UNKNOWN is neither right nor wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..engine.errors import DataError
from .config import FilterConfig

NEVER = -1


class Attempts:
    """Arrays over the training prompts; nothing else of a prompt is held.

    solved, hopeless: visits in a row with all rollouts correct, or all wrong. `at`: epoch of the last visit.
    """

    def __init__(self, n: int, memory: float, config: FilterConfig | None) -> None:
        self.rates = np.full(n, np.nan)
        self.rejoined = 0
        """Retired prompts that came back because a step had too few others."""
        self._memory = memory
        self._filter = config
        self._solved = np.zeros(n, np.int32)
        self._hopeless = np.zeros(n, np.int32)
        self._at = np.full(n, NEVER, np.int32)

    def observe(self, row: int, correct: Sequence[bool], unknown: int, epoch: int) -> None:
        """One visit: which of the scored rollouts were correct, and how many have no known score."""
        if not correct:
            return
        rate = sum(correct) / len(correct)
        old = self.rates[row]
        keep = 0.0 if np.isnan(old) else self._memory
        self.rates[row] = (keep * old if keep else 0.0) + (1 - keep) * rate
        self._at[row] = epoch
        # All correct (or all wrong) is only known where every score is.
        whole = not unknown
        self._solved[row] = 0 if rate < 1 else self._solved[row] + whole
        self._hopeless[row] = 0 if rate > 0 else self._hopeless[row] + whole

    def active(self, rows: np.ndarray, epoch: int) -> np.ndarray | None:
        """Which of these rows may be drawn in this epoch (bool); None where nothing is filtered."""
        if self._filter is None:
            return None
        return ~(self._is_solved(rows) | self._is_hopeless(rows, epoch))

    def rejoin(self, rows: np.ndarray) -> None:
        """Let retired prompts of these rows take part again, as if never visited."""
        retired = rows[self._is_solved(rows) | self._is_hopeless(rows, None)]
        self.rejoined += len(retired)
        self._solved[retired] = self._hopeless[retired] = 0

    def metrics(self, parts: Sequence[tuple[np.ndarray, int]]) -> dict[str, float]:
        """Counts over (rows, epoch) of each part, by the names of docs/metrics.md."""
        found: dict[str, float] = {}
        seen = ~np.isnan(self.rates)
        found["data/visited"] = int(seen.sum())
        if seen.any():
            found["data/success_rate"] = float(self.rates[seen].mean())
        if self._filter is not None:
            solved = sum(int(self._is_solved(rows).sum()) for rows, _ in parts)
            hopeless = sum(int(self._is_hopeless(rows, epoch).sum()) for rows, epoch in parts)
            active = len(self.rates) - solved - hopeless
            found |= {
                "data/solved": solved,
                "data/hopeless": hopeless,
                "data/active": active,
                "data/rejoined": self.rejoined,
            }
        return found

    def state_dict(self) -> dict[str, Any]:
        """Of visited prompts only; floats come back from JSON to the bit."""
        rows = np.flatnonzero(self._at != NEVER)
        return {
            "rows": rows.tolist(),
            "rates": self.rates[rows].tolist(),
            "solved": self._solved[rows].tolist(),
            "hopeless": self._hopeless[rows].tolist(),
            "at": self._at[rows].tolist(),
            "rejoined": self.rejoined,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises DataError where it is none."""
        names = {"rows", "rates", "solved", "hopeless", "at", "rejoined"}
        if set(state) != names or len({len(state[name]) for name in names - {"rejoined"}}) > 1:
            raise DataError(f"not a state of observed prompts: it has the keys {sorted(state)}")
        rows = np.array(state["rows"], np.int64)
        self.rates[:], self._solved[:], self._hopeless[:], self._at[:] = np.nan, 0, 0, NEVER
        self.rates[rows] = state["rates"]
        self._solved[rows] = state["solved"]
        self._hopeless[rows] = state["hopeless"]
        self._at[rows] = state["at"]
        self.rejoined = state["rejoined"]

    def _is_solved(self, rows: np.ndarray) -> np.ndarray:
        limit = self._filter and self._filter.solved_after
        return self._solved[rows] >= limit if limit else np.zeros(len(rows), bool)

    def _is_hopeless(self, rows: np.ndarray, epoch: int | None) -> np.ndarray:
        """`epoch`: those due for another try in it are not."""
        limit = self._filter and self._filter.hopeless_after
        if not limit:
            return np.zeros(len(rows), bool)
        found = self._hopeless[rows] >= limit
        retry = self._filter and self._filter.retry_every
        if retry and epoch is not None:
            found &= epoch < self._at[rows] + retry
        return found
