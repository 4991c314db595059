"""Expert losses decided by the row: rewards of stored responses, and the row's loss at its last visit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import nan
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from ..engine.contracts import Need
from ..engine.errors import DataError
from ..engine.types import TrainBatch
from .expert_base import ExpertLossBase, Supervised, TokenLoss, stored, supervised
from .losses import MAX_LOG_RATIO, sum_rows

if TYPE_CHECKING:
    from torch import Tensor


class Glow(ExpertLossBase):
    """Gain-based sample weight (arXiv 2601.04992): rows that stopped improving weigh more; 1 on a first visit."""

    type: Literal["glow"] = "glow"
    weight_scale: float = Field(default=1.0, gt=0)
    gain_sharpness: float = Field(default=20.0, ge=0)
    weight_min: float = Field(default=0.5, ge=0)
    weight_max: float = Field(default=5.0, gt=0)

    remembers: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"minibatch_stats"})

    def recall(
        self, batch: TrainBatch, logprobs: Tensor | None, memory: Mapping[str, float]
    ) -> TrainBatch:
        """The row's mean loss at its last visit, by `sample_ids`; the present one is what it leaves."""
        assert logprobs is not None
        mask = supervised(batch)
        counts = sum_rows(mask.to(logprobs.dtype), batch)
        losses = sum_rows(-logprobs.where(mask, 0.0), batch) / counts.clamp(min=1)
        seen = [i for i, count in enumerate(counts.tolist()) if count]
        nameless = [batch.group_names[i] for i in seen if not batch.sample_ids[i]]
        if nameless:
            raise DataError(
                f"glow remembers rows, but an expert row of prompt {nameless[0]!r} has no Sample.sample_id"
            )
        last = [memory.get(sample_id, nan) for sample_id in batch.sample_ids]
        values = losses.tolist()
        return replace(
            batch,
            previous_losses=losses.new_tensor(last),
            visits={batch.sample_ids[i]: values[i] for i in seen},
        )

    def weights(self, losses: Tensor, previous: Tensor) -> Tensor:
        """[N] mean losses now and at the last visit (NaN: never visited) -> [N] weights."""
        gain = previous - losses
        weight = self.weight_scale * (-self.gain_sharpness * gain).sigmoid()
        return weight.clamp(self.weight_min, self.weight_max).where(previous == previous, 1.0)

    def __call__(self, tokens: Supervised) -> TokenLoss:
        losses = tokens.row_mean(-tokens.logprobs.detach())
        weights = self.weights(losses, tokens.column("previous_losses"))
        return tokens.weighted(weights[tokens.batch.row_ids])


class RewardSigned(ExpertLossBase):
    """Rows are stored responses of either sign; token weights only decide membership."""

    standalone: ClassVar[bool] = True
    scales_with_weights: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"demonstration_scores"})

    def prepare(
        self, batch: TrainBatch, logprobs: Tensor | None, coefs: Mapping[str, float]
    ) -> TrainBatch:
        stored(batch, "rewards")
        return batch


class Topr(RewardSigned):
    """Tapered off-policy REINFORCE (arXiv 2503.14286): x = -sg[clip(q)] A log p, q the row's ratio, A its reward."""

    type: Literal["topr"] = "topr"
    positive_ratio_low: float = Field(default=1.0, ge=0)
    positive_ratio_high: float = Field(default=1.0, ge=0)
    negative_ratio_low: float = Field(default=0.0, ge=0)
    negative_ratio_high: float = Field(default=1.0, ge=0)
    reward_baseline: float = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> Topr:
        for sign in ("positive", "negative"):
            if getattr(self, f"{sign}_ratio_low") > getattr(self, f"{sign}_ratio_high"):
                raise ValueError(f"topr: {sign}_ratio_low must not be above {sign}_ratio_high")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"demonstration_scores", "behaviour_logprobs"})

    def prepare(
        self, batch: TrainBatch, logprobs: Tensor | None, coefs: Mapping[str, float]
    ) -> TrainBatch:
        stored(batch, "behaviour_logprobs")
        return super().prepare(batch, logprobs, coefs)

    def __call__(self, tokens: Supervised) -> TokenLoss:
        batch, mask = tokens.batch, tokens.members.mask
        advantage = batch.rewards.nan_to_num(0.0) - self.reward_baseline
        gap = tokens.logprobs.detach().where(mask, 0.0) - tokens.column("behaviour_logprobs")
        ratio = sum_rows(gap, batch).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        positive = ratio.clamp(self.positive_ratio_low, self.positive_ratio_high)
        negative = ratio.clamp(self.negative_ratio_low, self.negative_ratio_high)
        taper = positive.where(advantage >= 0, negative)
        has_tokens = sum_rows(mask.to(taper.dtype), batch) > 0
        mean = taper.where(has_tokens, 0.0).sum() / max(tokens.members.rows, 1)
        values = -(taper * advantage)[batch.row_ids] * tokens.logprobs
        return TokenLoss(values, {"taper_mean": mean})


class Rift(RewardSigned):
    """Reward-informed fine-tuning (arXiv 2601.09253): -s log p for good rows, -s p (bounded) for bad ones."""

    type: Literal["rift"] = "rift"
    positive_reward: float = 1.0
    negative_reward: float = -0.2
    success_threshold: float = 1.0
    probability_scope: Literal["token", "row_mean", "row_sum"] = "token"
    """row_*: mean or sum of the row's log-probs instead of each token's; rows are then averaged."""

    def __call__(self, tokens: Supervised) -> TokenLoss:
        batch, mask = tokens.batch, tokens.members.mask
        good = batch.rewards >= self.success_threshold
        scale = (batch.rewards * 0 + self.positive_reward).where(good, self.negative_reward)
        scale = scale[batch.row_ids].where(mask, 0.0)
        logprobs = tokens.logprobs.where(mask, 0.0)
        if self.probability_scope != "token":
            sums = sum_rows(logprobs, batch)
            rows = tokens.row_mean(logprobs) if self.probability_scope == "row_mean" else sums
            logprobs = rows[batch.row_ids]
        values = -scale * logprobs.where(scale > 0, logprobs.exp())
        own = None if self.probability_scope == "token" else "rows"
        return TokenLoss(values, normalizer=own)
