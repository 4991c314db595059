"""The arithmetic of data selection, on plain numbers: which rows and tokens a rule keeps.

Rankings put the highest first, ties to the earlier row or token. Counts from fractions are rounded as stated.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, dist, exp, floor, inf
from statistics import fmean
from typing import Literal

LARGEST_SHARE = 0.49
"""Upper end of the bisection over q_tuning's quantile."""


def quantile(values: Sequence[float], share: float) -> float:
    """Smallest of the values with at least `share` of them at or below it."""
    ordered = sorted(values)
    return ordered[max(ceil(share * len(ordered) - 1e-9) - 1, 0)]


def best(scores: Sequence[float], count: int) -> list[int]:
    """Places of the `count` highest scores, in row order."""
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


def q_tuning_rows(
    perplexity: Sequence[float], entropy: Sequence[float], keep_fraction: float, num_steps: int
) -> tuple[list[int], list[int], list[int]]:
    """(kept whole, kept with token pruning, added to fill up), rows in order.

    Whole: low perplexity, high entropy. Pruned: high perplexity, low entropy. One quantile bounds all four, found by
    bisection so that about `keep_fraction` of the rows are kept.
    """
    n = len(perplexity)
    if n == 0:
        return [], [], []
    low, high = 0.0, LARGEST_SHARE
    whole: list[int] = []
    pruned: list[int] = []
    for _ in range(num_steps):
        share = (low + high) / 2
        whole, pruned = corners(perplexity, entropy, share)
        if len(whole) + len(pruned) < keep_fraction * n:
            low = share
        else:
            high = share
    missing = ceil(keep_fraction * n - 1e-9) - len(whole) - len(pruned)
    rest = sorted(set(range(n)) - {*whole, *pruned})
    gaps = [abs(p - e) for p, e in zip(scaled(perplexity), scaled(entropy), strict=True)]
    added = best([gaps[i] for i in rest], max(missing, 0))
    return whole, pruned, [rest[i] for i in added]


def corners(
    perplexity: Sequence[float], entropy: Sequence[float], share: float
) -> tuple[list[int], list[int]]:
    """Rows in the two opposite corners that the quantiles `share` and 1 - `share` cut off; none is in both."""
    p_low, p_high = quantile(perplexity, share), quantile(perplexity, 1 - share)
    e_low, e_high = quantile(entropy, share), quantile(entropy, 1 - share)
    pairs = list(enumerate(zip(perplexity, entropy, strict=True)))
    whole = [i for i, (p, e) in pairs if p <= p_low and e >= e_high]
    pruned = [i for i, (p, e) in pairs if p >= p_high and e <= e_low and i not in whole]
    return whole, pruned


def scaled(values: Sequence[float]) -> list[float]:
    """To [0, 1]; all 0 where they are equal."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def prune_tokens(
    nll: Sequence[float],
    keep_fraction: float,
    neighbor_weight: float,
    drop: Literal["highest", "lowest"],
) -> list[bool]:
    """Which tokens of a row stay: the share with the lowest (or highest) perplexity, smoothed over the neighbours.

    Of equal scores the earlier token counts as the higher one.
    """
    p = [0.0, *(exp(value) for value in nll), 0.0]
    scores = [
        (1 - neighbor_weight) * p[t] + neighbor_weight * (p[t - 1] + p[t + 1])
        for t in range(1, len(p) - 1)
    ]
    kept = ceil(keep_fraction * len(scores) - 1e-9)
    if drop == "lowest":
        stay = best(scores, kept)
        return [t in stay for t in range(len(scores))]
    gone = best(scores, len(scores) - kept)
    return [t not in gone for t in range(len(scores))]


def uds_scores(
    norms: Sequence[float],
    sketches: Sequence[Sequence[float]],
    buffer: Sequence[Sequence[float]],
    diversity_weight: float,
) -> list[float]:
    """Nuclear norm plus the weighted mean distance of the row's sketch to those in the buffer (0 while it is empty)."""
    return [
        norm + diversity_weight * (fmean(dist(sketch, old) for old in buffer) if buffer else 0.0)
        for norm, sketch in zip(norms, sketches, strict=True)
    ]


def lobass_scores(base: Sequence[float], ref: Sequence[float]) -> list[float]:
    """Share of a row's mean loss that training takes away; a row that cost nothing to begin with ranks last."""
    return [(b - r) / b if b > 0 else -inf for b, r in zip(base, ref, strict=True)]


def share_of(fraction: float, n: int) -> int:
    """floor(fraction n), at least 1."""
    return max(1, floor(fraction * n + 1e-9))
