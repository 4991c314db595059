"""Expert losses that keep some tokens and drop others, or are counted in their own way."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from math import log
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ..engine.contracts import Need
from ..engine.types import Source, TrainBatch
from .expert_base import (
    Denominator,
    ExpertLossBase,
    Supervised,
    TokenLoss,
    highest,
    highest_share,
    rounded_up,
    rows_of,
    stored,
    supervised,
    with_kept,
    with_stats,
)
from .losses import Members, sum_rows

if TYPE_CHECKING:
    from torch import Tensor

ALPHA_OF_NLL = 1e-6


class ProbabilityThreshold(ExpertLossBase):
    """Shared by prob_family and profit: keep a token by its current probability."""

    denominator: Denominator = "kept_tokens"

    @abstractmethod
    def keeps(self, probability: Tensor) -> Tensor:
        """bool [T]: tokens whose current probability [T] lets them train."""

    @property
    def selects(self) -> bool:
        return True

    @property
    def needs(self) -> frozenset[Need]:
        counted = self.selects and self.denominator == "kept_tokens"
        return frozenset({"minibatch_stats"}) if counted else frozenset()

    def prepare(
        self, batch: TrainBatch, logprobs: Tensor | None, coefs: Mapping[str, float]
    ) -> TrainBatch:
        if "minibatch_stats" not in self.needs:
            return batch
        assert logprobs is not None
        return with_kept(batch, supervised(batch) & self.keeps(logprobs.exp()))

    def select(self, tokens: Supervised, values: Tensor) -> TokenLoss:
        if "minibatch_stats" in self.needs:
            return tokens.selected(values, "kept_tokens", tokens.kept())
        kept = tokens.members.mask & self.keeps(tokens.probability)
        return tokens.selected(values, "all_tokens", kept)


class ProbFamily(ProbabilityThreshold):
    """(1 - p^alpha) / alpha within probability bounds (arXiv 2510.00526); alpha 0 is NLL, gradient weight p^alpha."""

    type: Literal["prob_family"] = "prob_family"
    alpha: float = Field(default=1.0, ge=0)
    keep_probability_above: float | None = Field(default=None, ge=0, le=1)
    keep_probability_below: float | None = Field(default=None, ge=0, le=1)

    @property
    def selects(self) -> bool:
        return self.keep_probability_above is not None or self.keep_probability_below is not None

    def keeps(self, probability: Tensor) -> Tensor:
        kept = probability == probability
        if self.keep_probability_above is not None:
            kept = kept & (probability >= self.keep_probability_above)
        if self.keep_probability_below is not None:
            kept = kept & (probability <= self.keep_probability_below)
        return kept

    def __call__(self, tokens: Supervised) -> TokenLoss:
        values = -tokens.logprobs
        if self.alpha >= ALPHA_OF_NLL:
            values = -(self.alpha * tokens.logprobs).expm1() / self.alpha
        return self.select(tokens, values)


class Profit(ProbabilityThreshold):
    """Probability-guided token selection (arXiv 2601.09195): NLL of tokens above, below or between thresholds."""

    type: Literal["profit"] = "profit"
    direction: Literal["higher", "lower", "middle"] = "higher"
    threshold: float = Field(default=0.1, ge=0, le=1)
    threshold_high: float | None = Field(default=None, ge=0, le=1)
    """Upper bound of `middle`."""
    denominator: Denominator = "all_tokens"

    @model_validator(mode="after")
    def _bounds(self) -> Profit:
        if (self.direction == "middle") != (self.threshold_high is not None):
            raise ValueError("profit: set threshold_high with direction middle, and only then")
        if self.threshold_high is not None and self.threshold_high < self.threshold:
            raise ValueError("profit: threshold_high must not be below threshold")
        return self

    def keeps(self, probability: Tensor) -> Tensor:
        if self.direction == "lower":
            return probability <= self.threshold
        kept = probability >= self.threshold
        if self.threshold_high is not None:
            kept = kept & (probability <= self.threshold_high)
        return kept

    def __call__(self, tokens: Supervised) -> TokenLoss:
        return self.select(tokens, -tokens.logprobs)


class TokenWeight(ExpertLossBase):
    """NLL with weights from the data (critical tokens, arXiv 2510.10974); insists on the column, chooses the count."""

    type: Literal["token_weight"] = "token_weight"
    denominator: Literal["kept_tokens", "all_tokens", "weight_sum"] = "kept_tokens"
    """kept_tokens: non-zero weights; all_tokens: also zero-weight EXPERT tokens; weight_sum: the sum of weights."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"token_weights"})

    @property
    def tokens_only(self) -> bool:
        return self.denominator == "weight_sum"

    def prepare(
        self, batch: TrainBatch, logprobs: Tensor | None, coefs: Mapping[str, float]
    ) -> TrainBatch:
        mask = batch.source == Source.EXPERT
        rows = int((sum_rows(mask.to(batch.weights.dtype), batch) > 0).sum())
        weights = float(batch.weights.where(mask, 0.0).sum())
        return with_stats(batch, all_tokens=float(mask.sum()), all_rows=rows, weight_sum=weights)

    def __call__(self, tokens: Supervised) -> TokenLoss:
        batch, values = tokens.batch, -tokens.logprobs
        metrics = {"expert_weight_mean": tokens.members.mean(batch.weights)}
        if self.denominator == "all_tokens":
            counts = int(tokens.stat("all_tokens")), int(tokens.stat("all_rows"))
            return TokenLoss(values, metrics, Members(batch.source == Source.EXPERT, *counts))
        if self.denominator == "weight_sum" and tokens.members.tokens:
            values = values * (tokens.members.tokens / tokens.stat("weight_sum"))
        return TokenLoss(values, metrics)


class TokenCleaning(ExpertLossBase):
    """Token cleaning (arXiv 2502.01968): NLL of the tokens that the reference model gained most over the base."""

    type: Literal["token_cleaning"] = "token_cleaning"
    keep_fraction: float = Field(default=0.6, ge=0, le=1)
    scope: Literal["minibatch", "row"] = "minibatch"
    denominator: Denominator = "kept_tokens"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"base_logprobs", "ref_logprobs"})

    def prepare(
        self, batch: TrainBatch, logprobs: Tensor | None, coefs: Mapping[str, float]
    ) -> TrainBatch:
        scores = stored(batch, "ref_logprobs") - stored(batch, "base_logprobs")
        return with_kept(batch, highest_share(scores, batch, self.keep_fraction, self.scope))

    def __call__(self, tokens: Supervised) -> TokenLoss:
        return tokens.selected(-tokens.logprobs, self.denominator, tokens.kept())


class SsToken(ExpertLossBase):
    """ssToken (arXiv 2510.18250): keep the tokens of each row by gain over a past model and attention to the prompt."""

    type: Literal["sstoken"] = "sstoken"
    keep_fraction: float = Field(default=0.6, ge=0, le=1)
    loss_gap_weight: float = Field(default=0.5, ge=0, le=1)
    warmup_steps: int = Field(default=0, ge=0)
    """Loop steps that keep every token."""
    denominator: Denominator = "kept_tokens"

    @property
    def needs(self) -> frozenset[Need]:
        attention: set[Need] = {"prompt_attention"} if self.loss_gap_weight < 1 else set()
        return frozenset({"history_logprobs", *attention})

    def coefs(self, step: int) -> dict[str, float]:
        fraction = 1.0 if step < self.warmup_steps else self.keep_fraction
        return {**super().coefs(step), "expert_keep_fraction": fraction}

    def prepare(
        self, batch: TrainBatch, logprobs: Tensor | None, coefs: Mapping[str, float]
    ) -> TrainBatch:
        """How many tokens stay follows from row lengths alone; which ones is decided by each row's own scores."""
        stored(batch, "history_logprobs")
        if self.loss_gap_weight < 1:
            stored(batch, "prompt_attention")
        mask = supervised(batch)
        fraction = coefs.get("expert_keep_fraction", self.keep_fraction)
        counts = [rounded_up(fraction, int(mask[row].sum())) for row in rows_of(batch)]
        kept_rows = sum(count > 0 for count in counts)
        return with_stats(batch, kept_tokens=float(sum(counts)), kept_rows=float(kept_rows))

    def __call__(self, tokens: Supervised) -> TokenLoss:
        mask, fraction = tokens.members.mask, tokens.coef("expert_keep_fraction")
        gaps = tokens.logprobs.detach() - tokens.column("history_logprobs")
        kept = mask & False
        for row in rows_of(tokens.batch):
            count = int(mask[row].sum())
            if not count:
                continue
            members = gaps[row][mask[row]]
            low, high = members.min(), members.max()
            scores = (gaps[row] - low) / (high - low + 1e-8) * self.loss_gap_weight
            if self.loss_gap_weight < 1:
                attention = tokens.column("prompt_attention")[row]
                scores = scores + (1 - self.loss_gap_weight) * attention
            kept[row] = highest(scores, mask[row], rounded_up(fraction, count))
        return tokens.selected(-tokens.logprobs, self.denominator, kept)


class Forgetting(ExpertLossBase):
    """Forgetting (arXiv 2508.04329): learn positive tokens, unlearn negative ones, each with its own mean."""

    type: Literal["forgetting"] = "forgetting"
    keep_fraction: float = Field(default=0.7, ge=0, le=1)
    """Share of positive tokens, ranked as in token_cleaning."""
    scope: Literal["minibatch", "row"] = "minibatch"
    negative_coef_start: float = Field(default=1e-5, ge=0)
    negative_coef_end: float = Field(default=0.25, ge=0)
    negative_coef_steps: int = Field(ge=1)
    """Loop steps from start to end, linear."""
    negative_loss: Literal["ascent", "unlikelihood"] = "ascent"
    """ascent: log p (unbounded below); unlikelihood: -log(1 - p)."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"base_logprobs", "ref_logprobs"})

    @property
    def tokens_only(self) -> bool:
        return True

    def coefs(self, step: int) -> dict[str, float]:
        progress = min(step / self.negative_coef_steps, 1.0)
        span = self.negative_coef_end - self.negative_coef_start
        coef = self.negative_coef_start + span * progress
        return {**super().coefs(step), "negative_coef": coef}

    def prepare(
        self, batch: TrainBatch, logprobs: Tensor | None, coefs: Mapping[str, float]
    ) -> TrainBatch:
        scores = stored(batch, "ref_logprobs") - stored(batch, "base_logprobs")
        return with_kept(batch, highest_share(scores, batch, self.keep_fraction, self.scope))

    def __call__(self, tokens: Supervised) -> TokenLoss:
        members, coef = tokens.members, tokens.coef("negative_coef")
        positive = tokens.kept() & members.mask
        negative = members.mask & ~positive
        num_positive = int(tokens.stat("kept_tokens"))
        num_negative = members.tokens - num_positive
        # The component divides by all supervised tokens; each mean has its own count.
        gain = -tokens.logprobs.where(positive, 0.0) * (members.tokens / max(num_positive, 1))
        loss = tokens.logprobs.where(negative, -1.0)
        if self.negative_loss == "unlikelihood":
            loss = -log_one_minus_exp(loss)
        loss = loss.where(negative, 0.0) * (coef * members.tokens / max(num_negative, 1))
        metrics = {
            "expert_kept_fraction": members.mean(positive.to(loss.dtype)),
            "expert_negative_coef": tokens.constant(coef),
        }
        return TokenLoss(gain + loss, metrics)


def log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, accurate at both ends."""
    near = x > -log(2)
    small = (-x.where(near, -0.5).expm1()).log()
    large = (-x.where(~near, -1.0).exp()).log1p()
    return small.where(near, large)
