"""Expert losses decided by the row: rewards of stored responses, and the row's loss at its last visit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import nan
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ..engine.contracts import Need
from ..engine.errors import DataError
from ..engine.types import TrainBatch
from .expert_base import ExpertLossBase, Supervised, TokenLoss, stored, supervised
from .losses import sum_rows
from .reward_signed import SignFields, TaperFields, signed, tapered

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


class Topr(TaperFields, RewardSigned):
    """Tapered off-policy REINFORCE (arXiv 2503.14286): x = -sg[clip(q)] A log p, q the row's ratio, A its reward."""

    type: Literal["topr"] = "topr"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"demonstration_scores", "behaviour_logprobs"})

    def prepare(
        self, batch: TrainBatch, logprobs: Tensor | None, coefs: Mapping[str, float]
    ) -> TrainBatch:
        stored(batch, "behaviour_logprobs")
        return super().prepare(batch, logprobs, coefs)

    def __call__(self, tokens: Supervised) -> TokenLoss:
        batch = tokens.batch
        advantages = (batch.rewards.nan_to_num(0.0) - self.reward_baseline)[batch.row_ids]
        written = tokens.column("behaviour_logprobs")
        return TokenLoss(
            *tapered(tokens.logprobs, written, advantages, tokens.members, batch, self)
        )


class Rift(SignFields, RewardSigned):
    """Reward-informed fine-tuning (arXiv 2601.09253): -s log p for good rows, -s p (bounded) for bad ones."""

    type: Literal["rift"] = "rift"

    def __call__(self, tokens: Supervised) -> TokenLoss:
        batch = tokens.batch
        signs = batch.rewards.new_tensor([self.sign(r) for r in batch.rewards.tolist()])
        values = signed(
            tokens.logprobs, signs[batch.row_ids], tokens.members, batch, self.probability_scope
        )
        own = None if self.probability_scope == "token" else "rows"
        return TokenLoss(values, normalizer=own)
