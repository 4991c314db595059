"""Accuracy of a model on held-out prompts, with its uncertainty, and pass@k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import comb
from statistics import fmean

from .config import EvalConfig
from .types import Prompt, RolloutGroup, RolloutRequest, Sampling

SUCCESS = 1.0
"""Reward from which a rollout counts as correct in accuracy metrics."""
_Z = 1.96


@dataclass(frozen=True)
class EvalResult:
    """Accuracy over scored rollouts; UNKNOWN ones are counted beside, not in it."""

    accuracy: float
    low: float
    high: float
    """95 % interval of the accuracy: Wilson's with one rollout a prompt, else of the prompts' own accuracies."""
    mean_reward: float
    num_prompts: int
    num_scored: int
    num_unknown: int
    mean_response_length: float
    pass_at: Mapping[str, float] = field(default_factory=dict)
    """k -> pass@k for powers of two, over prompts with at least k scored rollouts; empty with one rollout a prompt."""


def evaluation_requests(
    prompts: Sequence[Prompt], config: EvalConfig, max_tokens: int
) -> list[RolloutRequest]:
    """What is sampled; `max_tokens` holds where the section sets no limit of its own."""
    sampling = Sampling(config.max_response_length or max_tokens, config.temperature)
    return [RolloutRequest(prompt, config.rollouts_per_prompt, sampling) for prompt in prompts]


def evaluate_groups(groups: Sequence[RolloutGroup]) -> EvalResult:
    """Raises ValueError where no score is known."""
    rewards = [reward for group in groups for reward in group.rewards]
    total = sum(len(group.scores) for group in groups)
    if not rewards:
        raise ValueError(f"evaluation has no known score: all {total} are UNKNOWN")
    counts = [
        (len(group.rewards), sum(reward >= SUCCESS for reward in group.rewards))
        for group in groups
        if group.rewards
    ]
    low, high = accuracy_interval(counts)
    lengths = [len(rollout.token_ids) for group in groups for rollout in group.rollouts]
    return EvalResult(
        accuracy=sum(right for _, right in counts) / len(rewards),
        low=low,
        high=high,
        mean_reward=fmean(rewards),
        num_prompts=len(groups),
        num_scored=len(rewards),
        num_unknown=total - len(rewards),
        mean_response_length=fmean(lengths),
        pass_at=pass_at_powers(counts),
    )


def pass_at_powers(counts: Sequence[tuple[int, int]]) -> dict[str, float]:
    """pass@1, 2, 4, ... up to the most rollouts of a prompt, from (scored, right) of each prompt."""
    most, found, k = max(n for n, _ in counts), dict[str, float](), 1
    while k <= most and most > 1:
        found[str(k)] = fmean(pass_at_k(n, right, k) for n, right in counts if n >= k)
        k *= 2
    return found


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased chance that at least one of k of n rollouts is right (arXiv 2107.03374, equation 1).

    >>> pass_at_k(n=4, right=1, k=2)
    0.5
    """
    return 1.0 - comb(n - right, k) / comb(n, k)


def accuracy_interval(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """95 % interval from (scored, right) of each prompt; rollouts of one prompt are not independent."""
    total, right = sum(n for n, _ in counts), sum(r for _, r in counts)
    if all(n == 1 for n, _ in counts):
        return wilson_interval(right, total)
    if len(counts) == 1:
        return 0.0, 1.0
    # The variance of a ratio of sums over prompts, linearized (Cochran 1977, cluster sampling).
    accuracy, num = right / total, len(counts)
    squares = sum((r - accuracy * n) ** 2 for n, r in counts)
    half = _Z * (num / (num - 1) * squares) ** 0.5 / total
    # Prompts that all agree leave no variance; Wilson's on the number of prompts bounds what that can mean.
    if squares == 0:
        return wilson_interval(round(accuracy * num), num)
    return max(0.0, accuracy - half), min(1.0, accuracy + half)


def wilson_interval(successes: int, n: int, z: float = _Z) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927)."""
    p = successes / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, center - half), min(1.0, center + half)
