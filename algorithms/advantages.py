"""Advantage estimators over the rewards of one step. Plain floats; no tensors.

"R" is a row's reward; None (never scored, or UNKNOWN) is in no population and gets advantage 0.
"""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Literal

Estimator = Literal[
    "group_std", "group_mean", "leave_one_out", "batch_std", "group_mean_batch_std", "none"
]
Population = Sequence[float]


def center(rewards: Population) -> list[float]:
    """R - mean; a lone row keeps R; exactly 0 where all are equal."""
    if len(rewards) == 1:
        return list(rewards)
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def standardize(rewards: Population, epsilon: float) -> list[float]:
    """(R - mean) / (std + epsilon) with ddof 1; a lone row gets R / (1 + epsilon)."""
    if len(rewards) == 1:
        return [rewards[0] / (1.0 + epsilon)]
    centered = center(rewards)
    std = sqrt(sum(value * value for value in centered) / (len(rewards) - 1))
    return [value / (std + epsilon) for value in centered]


def leave_one_out(rewards: Population) -> list[float]:
    """R - mean of the other rows; a lone row keeps R."""
    n = len(rewards)
    return [value * n / (n - 1) for value in center(rewards)] if n > 1 else list(rewards)


def by_group(
    rewards: Sequence[float | None],
    groups: Sequence[str],
    estimate: Callable[[Population], list[float]],
) -> list[float]:
    """Apply `estimate` to the scored rows of each group; unscored rows get 0."""
    members: dict[str, list[int]] = {}
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        if reward is not None:
            members.setdefault(group, []).append(i)
    advantages = [0.0] * len(rewards)
    for rows in members.values():
        values = estimate([reward for i in rows if (reward := rewards[i]) is not None])
        for i, value in zip(rows, values, strict=True):
            advantages[i] = value
    return advantages


def estimate_advantages(
    rewards: Sequence[float | None],
    groups: Sequence[str],
    estimator: Estimator,
    epsilon: float = 1e-6,
) -> list[float]:
    """One advantage a row, over whole groups or the whole step.

    Sources: DeepSeekMath (group_std), Dr.GRPO (group_mean), RLOO (leave_one_out), REINFORCE++ (batch_std, and
    group_mean_batch_std with its group baseline).
    """
    whole_step = ["step"] * len(groups)
    match estimator:
        case "group_std":
            return by_group(rewards, groups, lambda r: standardize(r, epsilon))
        case "group_mean":
            return by_group(rewards, groups, center)
        case "leave_one_out":
            return by_group(rewards, groups, leave_one_out)
        case "batch_std":
            return by_group(rewards, whole_step, lambda r: standardize(r, epsilon))
        case "group_mean_batch_std":
            centered = by_group(rewards, groups, center)
            known = [None if r is None else a for r, a in zip(rewards, centered, strict=True)]
            return by_group(known, whole_step, lambda r: standardize(r, epsilon))
        case "none":
            return [0.0 if reward is None else reward for reward in rewards]


def uniform_groups(rewards: Sequence[float | None], groups: Sequence[str]) -> set[str]:
    """Groups of two or more scored rows whose rewards are all equal: they carry no signal (DAPO drops them)."""
    known: dict[str, list[float]] = {}
    for reward, group in zip(rewards, groups, strict=True):
        if reward is not None:
            known.setdefault(group, []).append(reward)
    return {group for group, r in known.items() if len(r) > 1 and max(r) == min(r)}
