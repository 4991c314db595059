"""TOPR: tapered off-policy REINFORCE (arXiv 2503.14286).

Objective: -alpha (R - reward_baseline) log p over POLICY tokens - entropy_coef x entropy + kl_coef x KL. alpha is a
constant of the row, the sequence ratio q between policy and behaviour policy, clipped: to the `positive_ratio_*` range
where R >= reward_baseline, else to the `negative_ratio_*` range. By default rows above the baseline are imitated as
they are (alpha = 1), rows below it fade out as the policy leaves them (alpha <= 1).

Behaviour log-probs are `old_logprobs`: the policy's own before the update, or the recorded ones of offline rows. No
demonstrations are needed. Rewards should be signed, +1 and -1.

Departs from the paper: sums over sequences are divided by a constant length, and averaged over rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ..engine.contracts import LossFn, Need
from ..engine.types import LossOutput, PolicyOutput, Sample, TrainBatch
from .base import AlgorithmBase, RolloutFields, surrogate_needs
from .grpo import regularize
from .losses import MAX_LOG_RATIO, Members, Normalizer, sum_rows

if TYPE_CHECKING:
    from torch import Tensor


class ToprConfig(RolloutFields):
    type: Literal["topr"] = "topr"
    positive_ratio_low: float = Field(default=1.0, ge=0)
    positive_ratio_high: float = Field(default=1.0, ge=0)
    """Range of alpha where the reward is at least the baseline (a+ and b+ in the paper)."""
    negative_ratio_low: float = Field(default=0.0, ge=0)
    negative_ratio_high: float = Field(default=1.0, ge=0)
    """Range of alpha below the baseline (a- and b-)."""
    reward_baseline: float = 0.0
    normalizer: Normalizer = "constant"

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> ToprConfig:
        for kind in ("positive", "negative"):
            low, high = (getattr(self, f"{kind}_ratio_{end}") for end in ("low", "high"))
            if low > high:
                raise ValueError(
                    f"{kind}_ratio_low = {low} exceeds {kind}_ratio_high = {high}; exchange them"
                )
        return self


def taper(out: PolicyOutput, batch: TrainBatch, members: Members, config: ToprConfig) -> Tensor:
    """alpha of each token's row [T], a constant."""
    if batch.old_logprobs is None:
        raise ValueError("the taper needs old_logprobs; declare it in the algorithm's `needs`")
    difference = (out.logprobs.detach() - batch.old_logprobs).where(members.mask, 0.0)
    ratio = sum_rows(difference, batch).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()[batch.row_ids]
    positive = ratio.clamp(config.positive_ratio_low, config.positive_ratio_high)
    negative = ratio.clamp(config.negative_ratio_low, config.negative_ratio_high)
    return positive.where(batch.advantages >= 0, negative)


def topr_loss(
    out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float], *, config: ToprConfig
) -> LossOutput:
    """Tapered REINFORCE over POLICY tokens plus regularizers; advantages are R - reward_baseline."""
    members = Members.policy(batch)
    alpha = taper(out, batch, members, config)
    values = -alpha * batch.advantages * out.logprobs
    length = config.max_response_length
    component = members.normalize(values, batch, config.normalizer, length)
    metrics = {"policy_loss": component.detach()}
    if members.rows:
        metrics["taper_mean"] = members.normalize(alpha, batch, "rows", length)
    regularizers, more = regularize(out, batch, config)
    return LossOutput(component + regularizers, {**metrics, **more})


class Topr(AlgorithmBase):
    Config = ToprConfig

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {"main": partial(topr_loss, config=self.config)}

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        return {"main": surrogate_needs(self.config)}

    def credit(self, samples: Sequence[Sample]) -> list[Sample]:
        """R - reward_baseline on POLICY tokens; rows without a reward keep 0."""
        return [
            row
            if row.reward is None
            else row.with_advantage(row.reward - self.config.reward_baseline)
            for row in samples
        ]
