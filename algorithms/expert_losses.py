"""Interchangeable losses on demonstration tokens: `expert_loss: {type: ...}`. One type = one config + one function.

Each gives x_t, the loss of one supervised token before token weights and normalization. Weights that depend on the
policy are constants: without the detach, DFT's -p log p would *lower* p wherever p < 1/e. Formulas, sources and
deviations: docs/expert-losses.md.

Here: types that reweight or reshape every token. Selection is in expert_selection.py, rewards and history in
expert_rows.py, comparisons of responses in expert_pairs.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ..engine.contracts import Need
from ..engine.errors import DataError
from ..engine.types import TrainBatch
from .expert_base import (
    ExpertLossBase,
    Supervised,
    TokenLoss,
    median,
    rows_of,
    supervised,
    with_kept,
    with_stats,
)
from .expert_pairs import AlignedAsft, DiscriminativeFt, Dpop, Redi, Spin
from .expert_rows import Glow, Rift, Topr
from .expert_selection import (
    Forgetting,
    ProbFamily,
    Profit,
    SsToken,
    TokenCleaning,
    TokenWeight,
)
from .losses import Members, sum_rows

if TYPE_CHECKING:
    from torch import Tensor


class Nll(ExpertLossBase):
    """Negative log-likelihood: x = -log p."""

    type: Literal["nll"] = "nll"
    first_tokens: int | None = Field(default=None, ge=1)
    """Train only this many supervised tokens of each row (UPFT: 8); null: all."""

    def prepare(
        self, batch: TrainBatch, logprobs: Tensor | None, coefs: Mapping[str, float]
    ) -> TrainBatch:
        if self.first_tokens is None:
            return batch
        kept = supervised(batch)
        for row in rows_of(batch):
            kept[row] &= kept[row].cumsum(0) <= self.first_tokens
        return with_kept(batch, kept)

    def __call__(self, tokens: Supervised) -> TokenLoss:
        if self.first_tokens is None:
            return TokenLoss(-tokens.logprobs)
        first = tokens.kept()
        members = Members(first, int(tokens.stat("kept_tokens")), int(tokens.stat("kept_rows")))
        metrics = {"expert_probability": members.mean(tokens.probability)}
        return TokenLoss(-tokens.logprobs, metrics, members)


class Dft(ExpertLossBase):
    """Dynamic fine-tuning (arXiv 2508.05629): x = -sg[p] log p, the gradient of 1 - p."""

    type: Literal["dft"] = "dft"
    probability_level: Literal["token", "sequence"] = "token"
    """sequence: the product of the row's p on each of its tokens; underflows on long rows."""

    def __call__(self, tokens: Supervised) -> TokenLoss:
        if self.probability_level == "token":
            return tokens.weighted(tokens.probability)
        logprobs = tokens.logprobs.detach().where(tokens.members.mask, 0.0)
        sums = sum_rows(logprobs, tokens.batch)
        return tokens.weighted(sums.exp()[tokens.batch.row_ids])


class Phi(ExpertLossBase):
    """CHORD-phi (arXiv 2508.11408): x = -sg[p (1 - p)] log p; the weight is at most 1/4, at p = 1/2."""

    type: Literal["phi"] = "phi"

    def __call__(self, tokens: Supervised) -> TokenLoss:
        p = tokens.probability
        return tokens.weighted(p * (1 - p))


class Psft(ExpertLossBase):
    """Proximal SFT (arXiv 2508.17784): x = -min(r, 1 + clip_high), r = p / p_old."""

    type: Literal["psft"] = "psft"
    clip_high: float = Field(default=0.28, ge=0)
    log_ratio_limit: float = Field(default=20.0, gt=0)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"old_logprobs"})

    def __call__(self, tokens: Supervised) -> TokenLoss:
        mask = tokens.members.mask
        difference = tokens.logprobs.where(mask, 0.0) - tokens.column("old_logprobs")
        ratio = difference.clamp(-self.log_ratio_limit, self.log_ratio_limit).exp()
        high = 1 + self.clip_high
        clipped = ratio.detach() > high
        metrics = {
            "expert_clip_fraction": tokens.members.mean(clipped.to(ratio.dtype)),
            "expert_approx_kl": tokens.members.mean(-difference.detach()),
        }
        return TokenLoss(-ratio.where(~clipped, high), metrics)


class Asft(ExpertLossBase):
    """Anchored SFT (arXiv 2509.23753): x = sg[omega] ell + kl_coef KL to the reference over the whole vocabulary."""

    type: Literal["asft"] = "asft"
    base_weight: Literal["probability", "one"] = "probability"
    kl_coef: float = Field(default=0.05, ge=0)
    kl_direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(ref || pi); reverse: KL(pi || ref)."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"ref_kl"})

    def __call__(self, tokens: Supervised) -> TokenLoss:
        out = tokens.out
        kl = out.forward_kl if self.kl_direction == "forward" else out.reverse_kl
        if kl is None:
            raise DataError("asft needs the KL to the reference; declare `ref_kl` in `needs`")
        p = tokens.probability
        omega = p if self.base_weight == "probability" else p * 0 + 1
        values = -omega * tokens.logprobs + self.kl_coef * kl
        return TokenLoss(values, {"expert_kl": tokens.members.mean(kl.detach())})


class Eaft(ExpertLossBase):
    """Entropy-adaptive fine-tuning (arXiv 2601.02151): x = sg[(h / entropy_normalizer)^exponent] ell.

    h is the entropy of the softmax over the `top_k` largest logits.
    """

    type: Literal["eaft"] = "eaft"
    top_k: int = Field(default=20, ge=2)
    entropy_normalizer: float | None = Field(default=None, gt=0)
    """null: ln min(top_k, vocabulary)."""
    exponent: float = Field(default=1.0, ge=0)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"topk_entropy"})

    @property
    def entropy_top_k(self) -> int:
        return self.top_k

    def __call__(self, tokens: Supervised) -> TokenLoss:
        out = tokens.out
        if out.topk_entropy is None:
            raise DataError("eaft needs the top-k entropy; declare `topk_entropy` in `needs`")
        scale = self.entropy_normalizer or log(min(self.top_k, out.vocabulary))
        return tokens.weighted((out.topk_entropy.detach() / scale) ** self.exponent)


class IwSft(ExpertLossBase):
    """Importance-weighted SFT (arXiv 2507.12856): x = sg[clip((p / p_ref)^ratio_exponent)] ell, by row or token."""

    type: Literal["iw_sft"] = "iw_sft"
    level: Literal["sequence", "token"] = "sequence"
    ratio_exponent: float = 1.0
    weight_min: float | None = Field(default=None, ge=0)
    """null: 0.0 (sequence), 0.2 (token)."""
    weight_max: float | None = Field(default=None, gt=0)
    """null: 16.0 (sequence), 1.8 (token)."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"ref_logprobs"})

    def __call__(self, tokens: Supervised) -> TokenLoss:
        mask = tokens.members.mask
        gap = tokens.logprobs.detach().where(mask, 0.0) - tokens.column("ref_logprobs")
        low, high = (0.0, 16.0) if self.level == "sequence" else (0.2, 1.8)
        low = low if self.weight_min is None else self.weight_min
        high = high if self.weight_max is None else self.weight_max
        if self.level == "sequence":
            gap = tokens.row_mean(gap)[tokens.batch.row_ids]
        return tokens.weighted((self.ratio_exponent * gap).exp().clamp(low, high))


class Talr(ExpertLossBase):
    """Token-adaptive reweighting (arXiv 2509.20758): x = sg[max(p^(1/tau), weight_floor)] ell.

    `simplex`: weights p^(1/tau) divided by their sum over the minibatch, no floor.
    """

    type: Literal["talr"] = "talr"
    temperature: float | Literal["sequence_median", "token_median", "token_mean"] = (
        "sequence_median"
    )
    weight_floor: float = Field(default=0.01, ge=0)
    normalization: Literal["none", "simplex"] = "none"
    min_temperature: float = Field(default=0.001, gt=0)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"minibatch_stats"})

    @property
    def tokens_only(self) -> bool:
        return self.normalization == "simplex"

    def prepare(
        self, batch: TrainBatch, logprobs: Tensor | None, coefs: Mapping[str, float]
    ) -> TrainBatch:
        assert logprobs is not None
        mask = supervised(batch)
        if not bool(mask.any()):
            return with_stats(batch, temperature=1.0, weight_sum=1.0)
        tau = max(self._raw_temperature(batch, -logprobs), self.min_temperature)
        weight_sum = float((logprobs[mask] / tau).exp().sum())
        return with_stats(batch, temperature=tau, weight_sum=weight_sum)

    def _raw_temperature(self, batch: TrainBatch, ell: Tensor) -> float:
        if not isinstance(self.temperature, str):
            return self.temperature
        mask = supervised(batch)
        if self.temperature == "token_mean":
            return float(ell[mask].mean())
        if self.temperature == "token_median":
            return median(ell[mask])
        counts = sum_rows(mask.to(ell.dtype), batch)
        sums = sum_rows(ell.where(mask, 0.0), batch)
        return median((sums / counts.clamp(min=1))[counts > 0])

    def __call__(self, tokens: Supervised) -> TokenLoss:
        tau = tokens.stat("temperature")
        omega = (tokens.logprobs.detach() / tau).exp()
        if self.normalization == "none":
            loss = tokens.weighted(omega.clamp(min=self.weight_floor))
        else:
            omega = omega / tokens.stat("weight_sum")
            mean = tokens.members.mean(omega)
            # The component divides by the number of tokens; the simplex weights already add up to 1.
            values = -omega * tokens.logprobs * tokens.members.tokens
            loss = TokenLoss(values, {"expert_weight_mean": mean})
        loss.metrics["expert_temperature"] = tokens.constant(tau)
        return loss


ExpertLoss = Annotated[
    Nll
    | Dft
    | Phi
    | ProbFamily
    | Profit
    | Psft
    | Asft
    | Eaft
    | IwSft
    | Talr
    | TokenWeight
    | TokenCleaning
    | SsToken
    | Forgetting
    | Glow
    | Topr
    | Rift
    | Dpop
    | Spin
    | AlignedAsft
    | DiscriminativeFt
    | Redi,
    Field(discriminator="type"),
]
