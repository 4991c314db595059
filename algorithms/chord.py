"""CHORD: a supervised stream inside RL, weighted by a schedule or by token (arXiv 2508.11408).

Objective: (1 - mu) x policy + mu x expert - entropy_coef x entropy + kl_coef x KL, policy and expert each divided by
its own global token count.

    CHORD-mu    expert_loss nll, mu annealed from mu_peak to mu_valley (the default here)
    CHORD-phi   expert_loss phi (weight p (1 - p), at most 1/4), a small constant mu (the public code's default)

The demonstrations are an independent stream: `expert_rows_per_step` rows whose prompts need not be rolled out. They
have no reward and are in no group statistics.

Departs from the public code: global token means (there, micro-batch means weighted by row counts); no dual clip by
default; no probability cut-off. From the paper: phi is a constant, as in the code, and the expert term is a token mean.
Entropy and KL are not scaled by 1 - mu.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from pydantic import Field

from ..engine.contracts import LossFn, Need
from ..engine.types import (
    LossOutput,
    PolicyOutput,
    Prompt,
    Source,
    StepPlan,
    TrainBatch,
    Update,
)
from .base import AlgorithmBase, may_run_ahead, surrogate_needs, surrogate_only
from .hybrid import HybridFields, hybrid_loss
from .schedules import warmup_cosine

FIRST_ROWS_NEED = frozenset[Need]({"old_logprobs", "entropy", "demonstrations"})
"""What can be had of rows before the others are there."""


class ChordConfig(HybridFields):
    type: Literal["chord"] = "chord"
    mu_peak: float = Field(default=0.9, ge=0, le=1)
    """Weight of the expert term after the warm-up; the policy term has 1 - mu."""
    mu_valley: float = Field(default=0.05, ge=0, le=1)
    mu_warmup_steps: int = Field(default=0, ge=0)
    mu_decay_steps: int = Field(default=200, ge=0)
    """Loop steps of the cosine from mu_peak to mu_valley."""
    expert_rows_per_step: int = Field(default=64, ge=1)
    """Demonstrations beside the rollouts of each step."""


def chord_loss(
    out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float], *, config: HybridFields
) -> LossOutput:
    """(1 - mu) policy + mu expert + regularizers; coefs: mu. The losses logged are those before mu."""
    mu = coefs["mu"]
    return hybrid_loss(out, batch, coefs, config, policy_weight=1 - mu, expert_weight=mu)


class Chord(AlgorithmBase):
    Config = ChordConfig

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {"main": partial(chord_loss, config=self.config)}

    @property
    def advantage_only(self) -> Mapping[str, frozenset[Source]]:
        return surrogate_only(self.config, Source.POLICY)

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        return {"main": surrogate_needs(self.config) | {"demonstrations"}}

    def coefs(self, step: int) -> dict[str, float]:
        c = self.config
        mu = warmup_cosine(step, c.mu_peak, c.mu_valley, c.mu_warmup_steps, c.mu_decay_steps)
        return {"mu": mu, **super().coefs(step)}

    def expert_rows(self, step: int) -> int:
        return self.config.expert_rows_per_step

    @may_run_ahead
    def plan(self, prompts: Sequence[Prompt], experts: Sequence[Prompt], step: int) -> StepPlan:
        """Where mu is 0 the expert rows would have no effect, so they are left out."""
        plan = super().plan(prompts, experts, step)
        return plan if self.coefs(step)["mu"] > 0 else StepPlan(plan.requests)

    def first_rows(self, plan: StepPlan, step: int) -> Update | None:
        """The demonstrations, which have a denominator of their own."""
        config = self.config
        shares_denominator = config.entropy_coef > 0 and config.entropy_scope == "all"
        if shares_denominator or self.needs["main"] - FIRST_ROWS_NEED or not plan.experts:
            return None
        rows = self.credit(self.demonstration_rows(plan.experts))
        return self.update(rows, self.coefs(step))
