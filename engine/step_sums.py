"""Numbers of one optimizer step, once they are summed over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING

import torch

from .types import Source

if TYPE_CHECKING:
    from torch import Tensor

    from .types import TrainBatch

REMEDY = (
    "Lower learner.learning_rate, or bound the ratio (algorithm.clip_high, algorithm.dual_clip)"
)


def not_finite(metrics: Mapping[str, float]) -> list[str]:
    return [name for name, value in metrics.items() if not isfinite(value)]


def diagnostics(
    batch: TrainBatch, logprobs: Tensor, hidden_grads: list[Tensor]
) -> dict[str, Tensor]:
    """Sums over one micro-batch that `derived_metrics` turns into metrics once they are added over ranks.

    Gradients are those of the last hidden states, taken from `hidden_grads`: they come for free, and separate by who
    wrote the token. Where nothing recorded the learner's log-probs before the update, the gap to the sampler is that of
    the current ones.
    """
    zero = torch.zeros((), device=logprobs.device, dtype=torch.float64)
    names = ("grad_sq_policy", "grad_sq_expert", "gap_sum", "gap_tokens")
    sums: dict[str, Tensor] = dict.fromkeys(names, zero)
    targets = batch.trained.nonzero().squeeze(-1)
    if hidden_grads and len(targets):
        squares = hidden_grads[-1].double().pow(2).sum(-1)
        source = batch.source[targets]
        sums["grad_sq_policy"] = squares[source == Source.POLICY].sum()
        sums["grad_sq_expert"] = squares[source == Source.EXPERT].sum()
    hidden_grads.clear()
    before = logprobs if batch.old_logprobs is None else batch.old_logprobs
    known = batch.is_trained(Source.POLICY) & batch.rollout_logprobs.isfinite()
    gap = (before - batch.rollout_logprobs)[known].abs().double()
    sums["gap_sum"], sums["gap_tokens"] = gap.sum(), known.sum().double()
    return sums


def derived_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Replace the sums by `expert_gradient_share` = |g_expert| / (|g_expert| + |g_policy|) and `sampler_gap`, the
    mean |log p_learner - log p_sampler| over policy tokens. Absent where there is nothing to compare.
    """
    kept = dict(metrics)
    policy, expert = kept.pop("grad_sq_policy") ** 0.5, kept.pop("grad_sq_expert") ** 0.5
    gap_sum, gap_tokens = kept.pop("gap_sum"), kept.pop("gap_tokens")
    if policy + expert > 0:
        kept["expert_gradient_share"] = expert / (policy + expert)
    if gap_tokens > 0:
        kept["sampler_gap"] = gap_sum / gap_tokens
    return kept
