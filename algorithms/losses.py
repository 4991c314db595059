"""Components that algorithms add up: policy surrogate, expert loss, entropy, KL. Pure functions of flat [T] tensors.

A component has member tokens and its own denominator, counted over all ranks and micro-batches of the minibatch
(`batch.denom`), so any split gives the same sum. An empty component is exactly 0 and stays attached to the graph.

Only tensor methods are used: importing this file does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from ..engine.types import PolicyOutput, Source, TrainBatch

if TYPE_CHECKING:
    from torch import Tensor

    from .expert_losses import ExpertLoss

MAX_LOG_RATIO = 20.0
Normalizer = Literal["tokens", "rows", "constant"]
Metrics = dict[str, "Tensor"]


@dataclass(frozen=True)
class Reduced:
    """An expert component that is no sum over tokens: already divided, and blind to normalizers."""

    value: Tensor
    metrics: Metrics


class SamplerCorrected(Protocol):
    """Fields of a config that `sampler_correction` reads."""

    sampler_ratio_cap: float | None
    sampler_ratio_level: Literal["token", "sequence"]
    sampler_ratio_mode: Literal["truncate", "mask"]


class Surrogate(SamplerCorrected, Protocol):
    """Fields of a config that `policy_component` reads."""

    clip_low: float | None
    clip_high: float | None
    dual_clip: float | None
    ratio_level: Literal["token", "sequence"]
    normalizer: Normalizer
    max_response_length: int


@dataclass(frozen=True)
class Members:
    """The tokens of one component and what the whole minibatch counts of them."""

    mask: Tensor  # bool [T]
    tokens: int
    rows: int
    absent_tokens: int = 0
    """Of `tokens`, how many are not computed because they have no gradient."""
    absent_rows: int = 0

    @classmethod
    def policy(cls, batch: TrainBatch) -> Members:
        return cls.counted(batch.is_trained(Source.POLICY), batch, "policy_tokens", "policy_rows")

    @classmethod
    def expert(cls, batch: TrainBatch) -> Members:
        return cls.counted(batch.is_trained(Source.EXPERT), batch, "expert_tokens", "expert_rows")

    @classmethod
    def all(cls, batch: TrainBatch) -> Members:
        return cls.counted(batch.trained, batch, "tokens", "rows")

    @classmethod
    def counted(cls, mask: Tensor, batch: TrainBatch, tokens: str, rows: str) -> Members:
        """Members with the named counts of the minibatch."""
        denom, absent = batch.denom, batch.denom.left_out
        missing = (0, 0) if absent is None else (getattr(absent, tokens), getattr(absent, rows))
        return cls(mask, getattr(denom, tokens), getattr(denom, rows), *missing)

    @property
    def computed(self) -> Members:
        """Those whose values exist: what a metric is a mean over. A loss divides by all."""
        tokens, rows = self.tokens - self.absent_tokens, self.rows - self.absent_rows
        return Members(self.mask, tokens, rows)

    def mean(self, values: Tensor) -> Tensor:
        """Token mean over the minibatch (this micro-batch's share of it)."""
        return values.where(self.mask, 0.0).sum() / max(self.tokens, 1)

    def normalize(
        self, values: Tensor, batch: TrainBatch, normalizer: Normalizer, max_response_length: int
    ) -> Tensor:
        """Sum of values x the weight of each member token.

        tokens: 1 / all member tokens; rows: 1 / (rows x tokens of the row); constant: 1 / (rows x max_response_length).
        """
        if normalizer == "tokens":
            return self.mean(values)
        row_sums = sum_rows(values.where(self.mask, 0.0), batch)
        if normalizer == "rows":
            row_sums = row_sums / sum_rows(self.mask.to(values.dtype), batch).clamp(min=1)
            return row_sums.sum() / max(self.rows, 1)
        return row_sums.sum() / (max(self.rows, 1) * max_response_length)


def sum_rows(values: Tensor, batch: TrainBatch) -> Tensor:
    """[T] -> [N]: the sum over each row's tokens."""
    return values.new_zeros(batch.num_rows).index_add(0, batch.row_ids, values)


def log_ratio(out: PolicyOutput, batch: TrainBatch, members: Members) -> Tensor:
    """clamp(logprobs - old_logprobs), 0 outside the component; no gradient where the clamp acts."""
    if batch.old_logprobs is None:
        raise ValueError(
            "the policy ratio needs old_logprobs; declare it in the algorithm's `needs`"
        )
    difference = (out.logprobs - batch.old_logprobs).where(members.mask, 0.0)
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def policy_ratio(
    out: PolicyOutput, batch: TrainBatch, members: Members, level: Literal["token", "sequence"]
) -> Tensor:
    """pi / pi_old per token [T]; `sequence` (GSPO, arXiv 2507.18071) gives each token its row's geometric mean."""
    difference = log_ratio(out, batch, members)
    if level == "sequence":
        counts = sum_rows(members.mask.to(difference.dtype), batch).clamp(min=1)
        difference = (sum_rows(difference, batch) / counts)[batch.row_ids]
    return difference.exp()


def sampler_correction(batch: TrainBatch, config: SamplerCorrected) -> Tensor:
    """Importance weight of learner over sampler, a constant [T]; 1 where the sampler is unknown or the cap is null.

    `sequence`: the product over the row's trained POLICY tokens, on each of them. Weights above the cap become the cap
    (`truncate`; IMPALA, arXiv 1802.01561) or 0 (`mask`); masked tokens stay in the denominator.
    """
    if config.sampler_ratio_cap is None:
        return batch.weights * 0 + 1
    assert batch.old_logprobs is not None
    known = batch.rollout_logprobs.isfinite() & batch.is_trained(Source.POLICY)
    gap = (batch.old_logprobs - batch.rollout_logprobs).where(known, 0.0)
    if config.sampler_ratio_level == "sequence":
        gap = sum_rows(gap, batch)[batch.row_ids]
    weight = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    cap = config.sampler_ratio_cap
    beyond = cap if config.sampler_ratio_mode == "truncate" else 0.0
    return weight.where(weight <= cap, beyond).where(known, 1.0)


def surrogate(
    out: PolicyOutput,
    batch: TrainBatch,
    config: Surrogate,
    members: Members,
    unclipped: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Clipped surrogate of each token [T] (PPO, arXiv 1707.06347; dual clip, 1912.09729), before normalization.

    max(-A r, -A clip(r)); with `dual_clip` c and A < 0 also min(., -A c). Ties take the unclipped branch.
    Tokens of the mask `unclipped` [T] have the loss -A r whatever the bounds.
    """
    ratio = policy_ratio(out, batch, members, config.ratio_level)
    advantages = batch.advantages
    loss = -advantages * ratio
    bounded_tokens = members.mask if unclipped is None else members.mask & ~unclipped
    low = None if config.clip_low is None else 1 - config.clip_low
    high = None if config.clip_high is None else 1 + config.clip_high
    clipped = members.mask & False
    if low is not None or high is not None:
        bounded = -advantages * ratio.clamp(low, high)
        clipped = bounded_tokens & (bounded > loss)
        loss = bounded.where(clipped, loss)
    dual_clipped = members.mask & False
    if config.dual_clip is not None:
        ceiling = -advantages * config.dual_clip
        dual_clipped = bounded_tokens & (advantages < 0) & (ceiling < loss)
        loss = ceiling.where(dual_clipped, loss)
    correction = sampler_correction(batch, config)
    loss = loss * correction
    computed = members.computed
    if not computed.tokens:
        return loss, {}
    metrics: Metrics = {
        "clip_fraction": computed.mean(clipped.to(loss.dtype)),
        "dual_clip_fraction": computed.mean(dual_clipped.to(loss.dtype)),
        "ratio_mean": computed.mean(ratio.detach()),
    }
    if config.sampler_ratio_cap is not None:
        metrics["sampler_weight_mean"] = computed.mean(correction)
    return loss, metrics


def policy_component(
    out: PolicyOutput,
    batch: TrainBatch,
    config: Surrogate,
    members: Members | None = None,
    unclipped: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Normalized surrogate over the members, by default POLICY tokens."""
    members = members or Members.policy(batch)
    loss, metrics = surrogate(out, batch, config, members, unclipped)
    component = members.normalize(loss, batch, config.normalizer, config.max_response_length)
    return component, {"policy_loss": component.detach(), **metrics}


def expert_component(
    out: PolicyOutput,
    batch: TrainBatch,
    expert_loss: ExpertLoss,
    normalizer: Normalizer,
    max_response_length: int,
    coefs: Mapping[str, float] | None = None,
) -> tuple[Tensor, Metrics]:
    """`expert_loss` over EXPERT tokens, scaled by token weights; the denominator counts tokens, not weights.

    `coefs`: the algorithm's, for types with a schedule (`expert_loss.coefs`).
    """
    supervised = Members.expert(batch)
    term = expert_loss.evaluate(out, batch, coefs or {})
    if isinstance(term, Reduced):
        return term.value, {"expert_loss": term.value.detach(), **term.metrics}
    members = term.members or supervised
    values = batch.weights * term.values if expert_loss.scales_with_weights else term.values
    component = members.normalize(values, batch, term.normalizer or normalizer, max_response_length)
    metrics: Metrics = {"expert_loss": component.detach()}
    if supervised.tokens:
        metrics["expert_probability"] = supervised.mean(out.logprobs.detach().exp())
        metrics |= term.metrics
    return component, metrics


def entropy_component(
    out: PolicyOutput, batch: TrainBatch, coef: float, members: Members
) -> tuple[Tensor | float, Metrics]:
    """-coef x token mean of the full-vocabulary entropy; always normalized by `tokens`."""
    if coef == 0:
        return 0.0, {}
    if out.entropy is None:
        raise ValueError("entropy_coef > 0 needs entropy; declare it in the algorithm's `needs`")
    entropy = members.mean(out.entropy)
    return -coef * entropy, {"entropy": entropy.detach()}


KlEstimator = Literal["k1", "k2", "k3"]


def kl_component(
    out: PolicyOutput,
    batch: TrainBatch,
    coef: float,
    estimator: KlEstimator,
    normalizer: Normalizer,
    max_response_length: int,
) -> tuple[Tensor | float, Metrics]:
    """coef x KL to the frozen reference over POLICY tokens; estimators of joschu.net/blog/kl-approx.html."""
    if coef == 0:
        return 0.0, {}
    if batch.ref_logprobs is None:
        raise ValueError("kl_coef > 0 needs ref_logprobs; declare it in the algorithm's `needs`")
    members = Members.policy(batch)
    d = (batch.ref_logprobs - out.logprobs).where(members.mask, 0.0)
    d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    values = {"k1": lambda: -d, "k2": lambda: d**2 / 2, "k3": lambda: d.exp() - d - 1}[estimator]()
    kl = members.normalize(values, batch, normalizer, max_response_length)
    return coef * kl, {"kl": kl.detach()}
