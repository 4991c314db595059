"""Where a run stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .evaluation import EvalResult
from .metrics import num_policy_steps
from .over_sampling import Carried
from .types import RolloutGroup, UpdateReport


@dataclass
class RunState:
    """What the checkpoint carries beside weights, data position and algorithm state."""

    step: int = 0
    """Completed loop steps."""
    policy_version: int = 0
    """Counts published weights; 0 are the initial ones."""
    syncs: int = 0
    """Weight syncs begun."""
    syncs_proved: int = 0
    """Weight syncs whose proof held; one that fails ends the run."""
    optimizer_steps: int = 0
    """Of the policy; a critic's are not counted."""
    skipped_updates: int = 0
    """Optimizer steps left out because a loss or gradient was not finite."""
    weights: str = ""
    """Digest of the weights that the samplers serve."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Trained tokens so far, by source; "computed": all of the forward passes; "generated": sampled to train on."""
    step_seconds: float = 0.0
    """Wall time of the steps so far, evaluation and checkpoints left out."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time so far, by phase."""
    eval_before: EvalResult | None = None
    eval_after: EvalResult | None = None
    eval_step: int | None = None
    """Completed steps when `eval_after` was measured."""
    best_step: int | None = None
    best_accuracy: float | None = None
    """The best evaluation after a step, and that step; the first one of equals."""
    carried: Carried = field(default_factory=Carried)

    def advance(self, reports: Sequence[UpdateReport]) -> bool:
        """Account for one finished step; weights that changed get a new version. Returns whether they did."""
        moved = num_policy_steps(reports)
        self.skipped_updates += sum(not report.applied for report in reports)
        self.step += 1
        self.policy_version += bool(moved)
        self.optimizer_steps += moved
        for report in reports:
            for source, n in report.tokens.items() if report.applied else ():
                self.tokens[source] = self.tokens.get(source, 0) + n
        return bool(moved)

    def count_generated(self, groups: Sequence[RolloutGroup]) -> None:
        """Add what a step sampled; forced prefixes were not sampled."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        generated = sum(len(rollout.token_ids) - rollout.prefix_len for rollout in rollouts)
        self.tokens["generated"] = self.tokens.get("generated", 0) + generated

    def note_evaluation(self, result: EvalResult) -> bool:
        """Record an evaluation of the present weights; returns whether none after a step was as good."""
        self.eval_after, self.eval_step = result, self.step
        if self.best_accuracy is not None and result.accuracy <= self.best_accuracy:
            return False
        self.best_step, self.best_accuracy = self.step, result.accuracy
        return True

    @property
    def accuracy(self) -> float | None:
        """Of the present weights; None where they were not evaluated."""
        here = self.eval_after is not None and self.eval_step == self.step
        return self.eval_after.accuracy if here and self.eval_after else None

    @property
    def trained_tokens(self) -> int:
        return self.tokens.get("policy", 0) + self.tokens.get("expert", 0)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunState:
        evals = {
            name: EvalResult(**values[name]) if values[name] else None
            for name in ("eval_before", "eval_after")
        }
        return cls(**{**values, **evals, "carried": Carried.from_json(values.get("carried", {}))})
