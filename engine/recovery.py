"""How often a lost learner is started again, and when that is no use any more."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import LearnerError, LearnerLost, Stalled

if TYPE_CHECKING:
    from .loop import Parts
    from .run_state import RunState

MAX_IN_ROW = 3
"""Restarts without one finished step in between."""


@dataclass
class Recovery:
    """Counts restarts of the learner within one process, and knows the state that a run without checkpoint began in."""

    max_restarts: int
    fresh: tuple[dict[str, Any], dict[str, Any]]
    """State of algorithm and data before the first step."""
    restarts: int = 0
    in_row: int = 0

    @classmethod
    def of(cls, max_restarts: int, parts: Parts) -> Recovery:
        fresh = parts.algorithm.state_dict(), parts.data.state_dict()
        return cls(max_restarts, copy.deepcopy(fresh))

    def step_done(self) -> None:
        self.in_row = 0

    def restart(self, parts: Parts, state: RunState | None, lost: LearnerLost) -> None:
        """Bring the learner back without any state, and everything else to the state before the first step.

        Raises LearnerError, or Stalled where ranks were stuck and not dead, once that was done too often.
        """
        step = "the start" if state is None else f"step {state.step + 1}"
        started = False
        while not started:
            self._count(step, lost)
            say = parts.log.console.say
            say(f"{step}: {lost}. The learner starts again from the last checkpoint")
            try:
                parts.learners.restart()
                started = True
            except LearnerLost as again:
                lost = again
        parts.algorithm.load_state_dict(copy.deepcopy(self.fresh[0]))
        parts.data.load_state_dict(copy.deepcopy(self.fresh[1]))

    def _count(self, step: str, lost: LearnerLost) -> None:
        limit = None
        if self.restarts >= self.max_restarts:
            limit = f"loop.max_restarts = {self.max_restarts} allows no further restart"
        elif self.in_row >= MAX_IN_ROW:
            limit = f"{MAX_IN_ROW} restarts in a row led to no finished step"
        if limit is not None:
            kind = Stalled if lost.stuck else LearnerError
            raise kind(f"{step}: {lost}; {limit}") from lost
        self.restarts += 1
        self.in_row += 1
