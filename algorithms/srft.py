"""SRFT: single-stage supervised and reinforcement fine-tuning, weighted by entropy (arXiv 2506.19767).

Objective: demo_sft + demo_rl + rollout - entropy_coef x entropy + kl_coef x KL, with

    demo_sft   -w_d log p on EXPERT tokens, w_d = demo_weight_scale x exp(demo_entropy_sign x h), a constant
    demo_rl    -A g(p) on EXPERT tokens, g(p) = p or p / (p + demo_shaping_gamma); A over rollouts and demonstration
    rollout    -a x on POLICY tokens: a = rollout_weight_scale x exp(h), a constant, where the row is right, else -1;
               x = log p, or the unclipped ratio

h is the current entropy of the token, or the mean over the row's trained tokens. No gate: an all-wrong group still
pushes its rollouts down, an all-right group up.

Groups are those of LUFFY: `expert_rows_per_group` of the `rollouts_per_prompt` rows are demonstrations with
the verifier's reward; one whose score is UNKNOWN, or whose group has no scored rollout, is left out.

Presets are rows of values: paper (the defaults); hpt_repo (demo_shaping_gamma 0.1, advantage group_mean, normalizer
constant). The official code is described with demo_entropy_sign +1, against its own text.

Departs from the paper: batch-wide entropy is not offered, as it would couple micro-batches; the reward is {1, 0} in A
and {1, -1} in the rollout term, as the paper needs both. `rollout` has no lower bound: keep the gradient clipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..engine.contracts import LossFn, Need
from ..engine.types import LossOutput, PolicyOutput, Sample, Source, TrainBatch
from .base import SCORED_DEMONSTRATIONS, credit_groups, regularizer_needs, surrogate_only
from .grpo import regularize
from .losses import Members, policy_ratio, sampler_correction, sum_rows
from .luffy import MixedGroupFields, MixedGroups, shape

if TYPE_CHECKING:
    from torch import Tensor


class SrftConfig(MixedGroupFields):
    type: Literal["srft"] = "srft"
    demo_weight_scale: float = Field(default=0.5, ge=0)
    rollout_weight_scale: float = Field(default=0.1, ge=0)
    demo_entropy_sign: Literal[-1, 1] = -1
    """-1: demonstrations weigh less where the policy is uncertain."""
    weight_entropy_scope: Literal["token", "row"] = "row"
    demo_shaping_gamma: float | None = Field(default=None, gt=0)
    """gamma of g(p) = p / (p + gamma); null: g(p) = p."""
    rollout_form: Literal["logprob", "ratio"] = "logprob"
    success_threshold: float = 1.0
    """Rewards below it count as wrong, partial credit included."""
    entropy_coef: float = Field(default=0.001, ge=0)
    entropy_scope: Literal["policy", "all"] = "all"


def weight_entropy(out: PolicyOutput, batch: TrainBatch, scope: Literal["token", "row"]) -> Tensor:
    """h [T], a constant: the entropy of each token, or the mean over its row's trained tokens."""
    if out.entropy is None:
        raise ValueError("the weights need entropy; declare it in the algorithm's `needs`")
    entropy = out.entropy.detach().where(batch.trained, 0.0)
    if scope == "token":
        return entropy
    counts = sum_rows(batch.trained.to(entropy.dtype), batch).clamp(min=1)
    return (sum_rows(entropy, batch) / counts)[batch.row_ids]


def normalize(values: Tensor, batch: TrainBatch, members: Members, config: SrftConfig) -> Tensor:
    """As everywhere, but under `constant` both kinds divide by all rows with trained tokens."""
    if config.normalizer == "constant":
        members = replace(members, rows=batch.denom.rows)
    return members.normalize(values, batch, config.normalizer, config.max_response_length)


def demonstration_components(
    out: PolicyOutput, batch: TrainBatch, weights: Tensor, config: SrftConfig
) -> tuple[Tensor, Tensor]:
    """demo_sft (always a token mean) and demo_rl; weights is w_d [T]."""
    members = Members.expert(batch)
    sft = members.mean(-weights * batch.weights * out.logprobs)
    gain = shape(out.logprobs.exp(), config.demo_shaping_gamma)
    return sft, normalize(-batch.advantages * gain, batch, members, config)


def rollout_component(
    out: PolicyOutput, batch: TrainBatch, weights: Tensor, config: SrftConfig
) -> Tensor:
    """-a x on POLICY tokens; weights is w_r [T], advantages are +1, -1, or 0 where the row has no reward."""
    members = Members.policy(batch)
    on_policy = config.rollout_form == "logprob"
    x = out.logprobs if on_policy else policy_ratio(out, batch, members, "token")
    values = -weights.where(batch.advantages > 0, batch.advantages) * x
    values = values * sampler_correction(batch, config)
    return normalize(values, batch, members, config)


def srft_loss(
    out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float], *, config: SrftConfig
) -> LossOutput:
    """The three components and regularizers; out.logprobs and out.entropy are [T]."""
    entropy = weight_entropy(out, batch, config.weight_entropy_scope)
    demo_weights = config.demo_weight_scale * (config.demo_entropy_sign * entropy).exp()
    rollout_weights = config.rollout_weight_scale * entropy.exp()
    sft, demo_rl = demonstration_components(out, batch, demo_weights, config)
    rollout = rollout_component(out, batch, rollout_weights, config)
    regularizers, metrics = regularize(out, batch, config)
    metrics |= {
        "demo_sft_loss": sft.detach(),
        "demo_rl_loss": demo_rl.detach(),
        "rollout_loss": rollout.detach(),
    }
    if batch.denom.expert_tokens:
        metrics["demo_weight_mean"] = Members.expert(batch).mean(demo_weights)
    if batch.denom.positive_tokens:
        right = batch.is_trained(Source.POLICY) & (batch.advantages > 0)
        total = rollout_weights.where(right, 0.0).sum()
        metrics["rollout_weight_mean"] = total / batch.denom.positive_tokens
    return LossOutput(sft + demo_rl + rollout + regularizers, metrics)


class Srft(MixedGroups):
    Config = SrftConfig

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {"main": partial(srft_loss, config=self.config)}

    @property
    def advantage_only(self) -> Mapping[str, frozenset[Source]]:
        return surrogate_only(self.config, Source.POLICY)

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        c = self.config
        needs: set[Need] = {"entropy", *SCORED_DEMONSTRATIONS}
        if c.rollout_form == "ratio" or c.sampler_ratio_cap is not None:
            needs.add("old_logprobs")
        return {"main": regularizer_needs(c) | needs}

    def credit(self, samples: Sequence[Sample]) -> list[Sample]:
        """EXPERT tokens get the group's advantage, POLICY tokens +1 where the row is right, else -1."""
        rows = credit_groups(samples, self.config, (Source.EXPERT,))
        return [
            row
            if row.reward is None
            else row.with_advantage(1.0 if row.reward >= self.config.success_threshold else -1.0)
            for row in rows
        ]
