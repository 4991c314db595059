"""Errors that a person can act on: each names what is wrong, the value, and the remedy.

All are picklable (they cross process boundaries) and also inherit the built-in class they refine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


class PlaitError(Exception):
    """Base of every error plait raises on purpose."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe.

    >>> print(Problem("loop.steps", -3, "must be at least 1"))
    loop.steps = -3: must be at least 1
    >>> print(Problem("loop", ..., "`...` stands for a value too long to print"))
    loop: `...` stands for a value too long to print
    """

    path: str
    value: object
    message: str

    def __str__(self) -> str:
        value = "" if self.value is ... else f" = {self.value!r}"
        return f"{self.path}{value}: {self.message}"


class ConfigError(PlaitError, ValueError):
    """The recipe is wrong; carries all problems found, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)

    @classmethod
    def at(cls, path: str, value: object, message: str) -> Self:
        return cls([Problem(path, value, message)])


class HubError(ConfigError):
    """A model or data set lies on a hub that does not answer; whether it exists is unknown."""


class DataError(PlaitError, ValueError):
    """A data set cannot be used; names file and line, or the prompt id."""


class RewardError(PlaitError, RuntimeError):
    """Rewards cannot be computed within the promises made (for example too many UNKNOWN)."""


class RolloutError(PlaitError, RuntimeError):
    """A rollout worker failed or exceeded its deadline."""


class LearnerError(PlaitError, RuntimeError):
    """A learner worker failed, or a number that must be finite is not."""


class WeightSyncError(PlaitError, RuntimeError):
    """Served weights are not the learner's; names the parameter."""


class CheckpointError(PlaitError, RuntimeError):
    """A checkpoint is missing, incomplete, or does not belong to this run."""
