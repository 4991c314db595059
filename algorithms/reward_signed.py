"""Losses that a row's own reward signs: TOPR and RIFT, algorithms on rollouts and expert losses on stored rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ..engine.config import Section
from ..engine.types import TrainBatch
from .losses import MAX_LOG_RATIO, Members, Metrics, sum_rows

if TYPE_CHECKING:
    from torch import Tensor

ProbabilityScope = Literal["token", "row_mean", "row_sum"]


class TaperFields(Section):
    """Tapered off-policy REINFORCE (arXiv 2503.14286)."""

    positive_ratio_low: float = Field(default=1.0, ge=0)
    positive_ratio_high: float = Field(default=1.0, ge=0)
    """Range of alpha where the reward is at least the baseline (a+ and b+ in the paper)."""
    negative_ratio_low: float = Field(default=0.0, ge=0)
    negative_ratio_high: float = Field(default=1.0, ge=0)
    """Range of alpha below the baseline (a- and b-)."""
    reward_baseline: float = 0.0

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> TaperFields:
        for kind in ("positive", "negative"):
            low, high = (getattr(self, f"{kind}_ratio_{end}") for end in ("low", "high"))
            if low > high:
                raise ValueError(
                    f"{kind}_ratio_low = {low} exceeds {kind}_ratio_high = {high}; exchange them"
                )
        return self


class SignFields(Section):
    """Reward-informed fine-tuning (arXiv 2601.09253)."""

    positive_reward: float = Field(default=1.0, ge=0)
    negative_reward: float = Field(default=-0.2, le=0)
    success_threshold: float = 1.0
    probability_scope: ProbabilityScope = "token"
    """row_*: mean or sum of the row's log-probs instead of each token's; rows are then averaged."""

    def sign(self, reward: float) -> float:
        """The signed reward s."""
        good = reward >= self.success_threshold
        return self.positive_reward if good else self.negative_reward


def taper(
    logprobs: Tensor,
    writer_logprobs: Tensor,
    advantages: Tensor,
    members: Members,
    batch: TrainBatch,
    fields: TaperFields,
) -> Tensor:
    """alpha of each token's row [T], a constant.

    The row's ratio exp(sum of log p - log p of its writer), clipped to the positive range where A >= 0, else to the
    negative one.
    """
    gaps = (logprobs.detach() - writer_logprobs).where(members.mask, 0.0)
    ratio = sum_rows(gaps, batch).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()[batch.row_ids]
    positive = ratio.clamp(fields.positive_ratio_low, fields.positive_ratio_high)
    negative = ratio.clamp(fields.negative_ratio_low, fields.negative_ratio_high)
    return positive.where(advantages >= 0, negative)


def tapered(
    logprobs: Tensor,
    writer_logprobs: Tensor,
    advantages: Tensor,
    members: Members,
    batch: TrainBatch,
    fields: TaperFields,
) -> tuple[Tensor, Metrics]:
    """-alpha A log p of each token [T], and the mean alpha of rows."""
    alpha = taper(logprobs, writer_logprobs, advantages, members, batch, fields)
    metrics: Metrics = {}
    if members.computed.rows:
        metrics["taper_mean"] = members.computed.normalize(alpha, batch, "rows", 1)
    return -alpha * advantages * logprobs, metrics


def scoped_logprobs(
    logprobs: Tensor, members: Members, batch: TrainBatch, scope: ProbabilityScope
) -> Tensor:
    """log p [T]: of the token, or of its whole row (mean or sum over its member tokens)."""
    logprobs = logprobs.where(members.mask, 0.0)
    if scope == "token":
        return logprobs
    rows = sum_rows(logprobs, batch)
    if scope == "row_mean":
        rows = rows / sum_rows(members.mask.to(rows.dtype), batch).clamp(min=1)
    return rows[batch.row_ids]


def signed(
    logprobs: Tensor, signs: Tensor, members: Members, batch: TrainBatch, scope: ProbabilityScope
) -> Tensor:
    """-s log p where s > 0, else -s p, whose gradient is bounded: [T]."""
    scoped = scoped_logprobs(logprobs, members, batch, scope)
    return -signs * scoped.where(signs > 0, scoped.exp())
