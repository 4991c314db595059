"""GRPO, group relative policy optimization (DeepSeekMath, arXiv 2402.03300), and its relatives as presets.

Objective: clipped surrogate over POLICY tokens - entropy_coef x entropy + kl_coef x KL to the reference.

A preset is a row of values, not a field:

    dr_grpo          advantage: group_mean, normalizer: constant           (arXiv 2503.20783)
    dapo             clip_high: 0.28, normalizer: tokens, drop_uniform_groups: true, refill_rounds: 3
                     (arXiv 2503.14476)
    gspo             ratio_level: sequence, clip_low: 3.0e-4, clip_high: 4.0e-4       (arXiv 2507.18071)
    rloo             advantage: leave_one_out, clips null, normalizer: constant       (arXiv 2402.14740)
    reinforce++      advantage: batch_std (or group_mean_batch_std), normalizer: tokens   (arXiv 2501.03262)

Departs from the papers: KL is a component of its own in the loss, with the same tokens; rloo's sequence sum is divided
by a constant length; reinforce++ standardizes rows, not tokens, and keeps its KL out of the reward.
dapo's refill draws only the prompts that are missing, for a bounded number of rounds (there: until the batch is full);
its overlong shaping belongs into the reward function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ..engine.contracts import DrawFn, LossFn, Need
from ..engine.types import (
    LossOutput,
    PolicyOutput,
    RolloutGroup,
    RolloutRequest,
    Source,
    StepPlan,
    TrainBatch,
    Update,
)
from .advantages import uniform_groups
from .base import (
    AlgorithmBase,
    PolicyFields,
    RolloutFields,
    Setup,
    SurrogateFields,
    surrogate_needs,
    surrogate_only,
)
from .losses import Members, Normalizer, entropy_component, kl_component, policy_component
from .rows import rollout_rows
from .step_size import StepSize


class GrpoConfig(PolicyFields):
    type: Literal["grpo"] = "grpo"
    normalizer: Normalizer = "rows"
    refill_rounds: int = Field(default=0, ge=0)
    """With drop_uniform_groups: extra rounds of rollouts that replace groups without signal by fresh prompts."""

    @model_validator(mode="after")
    def _refill_replaces_dropped_groups(self) -> GrpoConfig:
        if self.refill_rounds and not self.drop_uniform_groups:
            raise ValueError(
                f"algorithm.refill_rounds = {self.refill_rounds} replaces dropped groups, but "
                "algorithm.drop_uniform_groups is false; set it to true, or leave refill_rounds out"
            )
        return self


def grpo_loss(
    out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float], *, config: SurrogateFields
) -> LossOutput:
    """Surrogate, entropy bonus and KL penalty; out.logprobs and out.entropy are [T]."""
    policy, metrics = policy_component(out, batch, config)
    regularizers, more = regularize(out, batch, config)
    return LossOutput(policy + regularizers, {**metrics, **more})


def regularize(out: PolicyOutput, batch: TrainBatch, config: RolloutFields):
    """-entropy_coef x entropy (over `entropy_scope`) + kl_coef x KL, with their metrics."""
    scope = Members.all(batch) if config.entropy_scope == "all" else Members.policy(batch)
    entropy, entropy_metrics = entropy_component(out, batch, config.entropy_coef, scope)
    kl, kl_metrics = kl_component(
        out,
        batch,
        config.kl_coef,
        config.kl_estimator,
        config.normalizer,
        config.max_response_length,
    )
    return entropy + kl, {**entropy_metrics, **kl_metrics}


def with_signal(groups: Sequence[RolloutGroup]) -> int:
    """Groups with a scored row that `drop_uniform_groups` keeps."""
    scored = [(reward, group.prompt.prompt_id) for group in groups for reward in group.rewards]
    names = [name for _, name in scored]
    return len(set(names) - uniform_groups([reward for reward, _ in scored], names))


class GrpoBase(AlgorithmBase):
    """Methods whose only loss is grpo's."""

    extra_needs: ClassVar[frozenset[Need]] = frozenset()
    """What they consume beyond that loss."""

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {"main": partial(grpo_loss, config=self.config)}

    @property
    def advantage_only(self) -> Mapping[str, frozenset[Source]]:
        return surrogate_only(self.config, Source.POLICY)

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        return {"main": surrogate_needs(self.config) | self.extra_needs}


class Grpo(GrpoBase):
    Config = GrpoConfig

    def __init__(self, config: GrpoConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self._refilled: dict[str, float] = {}

    def follow_up(
        self, rounds: Sequence[Sequence[RolloutGroup]], step: int, draw: DrawFn
    ) -> Sequence[RolloutRequest]:
        """As many fresh prompts as groups with a signal are missing, for at most `refill_rounds` rounds."""
        if not self.config.refill_rounds:
            return ()
        planned, kept = len(rounds[0]), [with_signal(groups) for groups in rounds]
        missing = planned - sum(kept)
        self._refilled = {"kept_groups": sum(kept), "refilled_share": sum(kept[1:]) / planned}
        if missing == 0 or len(rounds) > self.config.refill_rounds:
            return ()
        return [self.request(prompt) for prompt in draw(missing)]

    def assemble(
        self, plan: StepPlan, groups: Sequence[RolloutGroup], step: int
    ) -> Sequence[Update]:
        """Dropped rows stay out of the update, so minibatches hold equal numbers of live groups.

        Where none is live, one row of weight 0 makes a step that moves by momentum and weight decay alone.
        """
        rows = self.credit(rollout_rows(groups))
        kept = [row for row in rows if row.weights.any()]
        return [self.update(kept or rows[:1], self.coefs(step))]

    def step_size(self, num_prompts: int, step: int) -> StepSize:
        """A refill asks for no more groups than the plan, and trained groups never exceed it."""
        size, rounds = super().step_size(num_prompts, step), 1 + self.config.refill_rounds
        return replace(size, rollouts=size.rollouts * rounds, rounds=rounds)

    def metrics(self) -> Mapping[str, float]:
        """With refill, of the last step: groups with a signal, and those of later rounds as a share of the plan."""
        return self._refilled
