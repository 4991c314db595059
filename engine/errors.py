"""Errors that a person can act on: each names what is wrong, the value, and the remedy.

All are picklable (they cross process boundaries) and also inherit the built-in class they refine. Each has an exit code
of the command line (docs/jobs.md): what watches over a job tells by it whether submitting again helps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self


class PlaitError(Exception):
    """Base of every error plait raises on purpose."""

    exit_code: ClassVar[int] = 1


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

    exit_code = 2

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

    exit_code = 2


class RewardError(PlaitError, RuntimeError):
    """Rewards cannot be computed within the promises made (for example too many UNKNOWN)."""

    exit_code = 5


class RolloutError(PlaitError, RuntimeError):
    """A rollout worker failed or exceeded its deadline."""

    exit_code = 7


class WorkerLost(RolloutError):
    """A rollout worker died, is silent or cannot be used any more; another one can do its work."""


class VersionGone(RolloutError):
    """No worker serves the weights that samples were begun with, and the learner has moved on."""


class LearnerError(PlaitError, RuntimeError):
    """A learner worker failed, or a number that must be finite is not."""

    exit_code = 6


class LearnerLost(LearnerError):
    """A learner rank died or is stuck; all ranks can be started again from the last checkpoint."""

    def __init__(self, message: str, *, stuck: bool = False) -> None:
        super().__init__(message)
        self.stuck = stuck
        """It was alive, as far as one knows, and did not answer."""


class WeightSyncError(PlaitError, RuntimeError):
    """Served weights are not the learner's; names the parameter."""

    exit_code = 8


class CheckpointError(PlaitError, RuntimeError):
    """A checkpoint is missing, incomplete, or does not belong to this run."""

    exit_code = 9


class ClusterError(PlaitError, RuntimeError):
    """The cluster does not have, or no longer has, what the run needs; names what is missing."""

    exit_code = 11


class Stopped(PlaitError):
    """Somebody asked the run to stop (SIGTERM, `ray job stop`, Ctrl-C); its state is on disk."""

    exit_code = 3


class Stalled(PlaitError, RuntimeError):
    """Nothing moved for longer than a deadline; names the one prompt, parameter or rank that the run waits for."""

    exit_code = 4


class RunInUse(PlaitError, RuntimeError):
    """Another process trains in this run folder."""

    exit_code = 10
