"""Numbers of one optimizer step, once they are summed over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

REMEDY = (
    "Lower learner.learning_rate, or bound the ratio (algorithm.clip_high, algorithm.dual_clip)"
)


def not_finite(metrics: Mapping[str, float]) -> list[str]:
    return [name for name, value in metrics.items() if not isfinite(value)]


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
