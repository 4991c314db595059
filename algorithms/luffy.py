"""LUFFY: mixed-policy GRPO with shaped expert ratios (arXiv 2504.14945).

Objective: one `policy` component over POLICY tokens (surrogate) and EXPERT tokens (-A f(p), never clipped)
- entropy_coef x entropy of all tokens + kl_coef x KL. f(p) = p / (p + shaping_gamma) with gradient, so the factor on
d log p is gamma p / (p + gamma)^2: at most 1/4, at p = gamma; rare expert tokens keep a signal.

`expert_rows_per_group` of the `rollouts_per_prompt` rows are demonstrations; the group's statistics are over the union.
A demonstration has the reward that the verifier gives its text; one whose score is UNKNOWN is left out, like a
rollout. Prompts without demonstration get rollouts only; where no rollout is scored, the demonstration stays out too.

Departs from the public code: one denominator for all rows of the minibatch (there, rows / 8192 per micro-batch, which
ties the balance with entropy to the split); demonstrations are rows of their own, not continued by the sampler. From
the paper: no std in the advantage and no clip, as in its code; entropy_coef 0.001 (paper 0.01).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ..engine.contracts import LossFn, Need
from ..engine.types import (
    LossOutput,
    PolicyOutput,
    Prompt,
    RolloutGroup,
    RolloutRequest,
    Sample,
    Source,
    StepPlan,
    TrainBatch,
    Update,
)
from .advantages import Estimator
from .base import (
    SCORED_DEMONSTRATIONS,
    AlgorithmBase,
    GroupFields,
    PolicyFields,
    credit_groups,
    may_run_ahead,
    surrogate_needs,
    surrogate_only,
)
from .grpo import regularize
from .losses import Members, Normalizer, surrogate
from .rows import demonstrated, rollout_rows, scored_expert_rows
from .step_size import StepSize

if TYPE_CHECKING:
    from torch import Tensor


class MixedGroupFields(GroupFields):
    """Fields of algorithms whose groups hold demonstrations in the place of rollouts."""

    expert_rows_per_group: int = Field(default=1, ge=1)
    """Rows of a group that are demonstrations, where the prompt has them."""

    @model_validator(mode="after")
    def _rollouts_remain(self) -> MixedGroupFields:
        if self.expert_rows_per_group >= self.rollouts_per_prompt:
            raise ValueError(
                f"expert_rows_per_group = {self.expert_rows_per_group} leaves no rollout of "
                f"rollouts_per_prompt = {self.rollouts_per_prompt}; lower the first or raise the second"
            )
        return self


class LuffyConfig(PolicyFields, MixedGroupFields):
    type: Literal["luffy"] = "luffy"
    shaping_gamma: float | None = Field(default=0.1, gt=0)
    """gamma of f(p) = p / (p + gamma); null: f(p) = p."""
    advantage: Estimator = "group_mean"
    clip_low: float | None = Field(default=None, ge=0)
    clip_high: float | None = Field(default=None, ge=0)
    normalizer: Normalizer = "constant"
    entropy_coef: float = Field(default=0.001, ge=0)
    entropy_scope: Literal["policy", "all"] = "all"


def shape(probability: Tensor, gamma: float | None) -> Tensor:
    """f(p) = p / (p + gamma), or p, with gradient; any shape."""
    return probability if gamma is None else probability / (probability + gamma)


def luffy_loss(
    out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float], *, config: LuffyConfig
) -> LossOutput:
    """Surrogate on POLICY tokens and -A f(p) on EXPERT tokens [T], over one denominator, plus regularizers."""
    rollout, demonstration = Members.policy(batch), Members.expert(batch)
    values, metrics = surrogate(out, batch, config, rollout)
    probability = out.logprobs.exp()
    shaped = shape(probability, config.shaping_gamma)
    values = (-batch.advantages * shaped).where(demonstration.mask, values)
    component = Members.all(batch).normalize(
        values, batch, config.normalizer, config.max_response_length
    )
    metrics = {"policy_loss": component.detach(), **metrics}
    if rollout.tokens:
        metrics["rollout_loss"] = rollout.mean(values.detach())
    if demonstration.tokens:
        metrics["demonstration_loss"] = demonstration.mean(values.detach())
    if demonstration.computed.tokens:
        metrics["expert_probability"] = demonstration.computed.mean(probability.detach())
        metrics["shaped_ratio_mean"] = demonstration.computed.mean(shaped.detach())
    regularizers, more = regularize(out, batch, config)
    return LossOutput(component + regularizers, {**metrics, **more})


class DemonstratedGroups(AlgorithmBase):
    """Plan and rows of groups whose last rows are demonstrations, `expert_rows_per_group` of them."""

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        return {"main": surrogate_needs(self.config) | SCORED_DEMONSTRATIONS}

    @may_run_ahead
    def plan(self, prompts: Sequence[Prompt], experts: Sequence[Prompt], step: int) -> StepPlan:
        return super().plan(prompts, [prompt for prompt in prompts if demonstrated(prompt)], step)

    def assemble(
        self, plan: StepPlan, groups: Sequence[RolloutGroup], step: int
    ) -> Sequence[Update]:
        c = self.config
        experts = scored_expert_rows(groups, c.expert_rows_per_group, c.max_response_length)
        rows = self.credit(rollout_rows(groups) + experts)
        return [self.update(rows, self.coefs(step))]


class MixedGroups(DemonstratedGroups):
    """Demonstrations take the places of rollouts."""

    def request(self, prompt: Prompt) -> RolloutRequest:
        """Rollouts for the rows that demonstrations leave."""
        num = min(self.config.expert_rows_per_group, len(demonstrated(prompt)))
        return RolloutRequest(prompt, self.config.rollouts_per_prompt - num, self.setup.sampling)

    def step_size(self, num_prompts: int, step: int) -> StepSize:
        """Demonstrations take the places of rollouts; a prompt without any is rolled out in full."""
        size = super().step_size(num_prompts, step)
        return replace(size, expert_rows=num_prompts * self.config.expert_rows_per_group)


class Luffy(MixedGroups):
    Config = LuffyConfig

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {"main": partial(luffy_loss, config=self.config)}

    @property
    def advantage_only(self) -> Mapping[str, frozenset[Source]]:
        return surrogate_only(self.config, Source.POLICY, Source.EXPERT)

    def credit(self, samples: Sequence[Sample]) -> list[Sample]:
        """EXPERT tokens train with an advantage too."""
        return credit_groups(samples, self.config, (Source.POLICY, Source.EXPERT))
