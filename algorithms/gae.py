"""Generalized advantage estimation (arXiv 1506.02438) over the POLICY tokens of packed rows. Tensor methods only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engine.types import Source, TrainBatch

if TYPE_CHECKING:
    from torch import Tensor


def discounted_advantages(
    rewards: Tensor, values: Tensor, discount: float, gae_lambda: float
) -> Tensor:
    """A [N, L] from token rewards and values [N, L]; rows start at column 0 and are padded with zeros.

    delta_t = reward_t + discount V_{t+1} - V_t and A_t = delta_t + discount gae_lambda A_{t+1}. What follows the last
    token is worth 0, for truncated rows too, so the padding needs no mask.
    """
    advantages = rewards.new_zeros(rewards.shape)
    following = rewards.new_zeros(len(rewards))
    next_values = rewards.new_zeros(len(rewards))
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + discount * next_values - values[:, t]
        following = delta + discount * gae_lambda * following
        advantages[:, t] = following
        next_values = values[:, t]
    return advantages


def estimate_gae(
    batch: TrainBatch, token_rewards: Tensor, discount: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [T] of POLICY tokens, 0 elsewhere; a return is advantage + value.

    `token_rewards` [T] are what each token earns by itself; the row's reward is added to its last POLICY token. A row
    without a reward has advantage 0, and its returns are its own values.
    """
    if batch.values is None:
        raise ValueError("GAE needs values; declare it in the algorithm's `needs`")
    places = (batch.source == Source.POLICY).nonzero().squeeze(-1)
    rows = batch.row_ids[places]
    values = batch.values.double()
    flat_advantages, flat_returns = values.new_zeros(len(values)), values.new_zeros(len(values))
    if len(places):
        lengths = rows.new_zeros(batch.num_rows).index_add(0, rows, rows.new_ones(len(rows)))
        columns = rows.new_ones(len(rows)).cumsum(0) - 1 - (lengths.cumsum(0) - lengths)[rows]
        scored = batch.rewards.isfinite()
        shape = (batch.num_rows, int(lengths.max()))
        earned, valued = values.new_zeros(shape), values.new_zeros(shape)
        earned[rows, columns] = token_rewards.double()[places]
        valued[rows, columns] = values[places]
        ends = (lengths > 0) & scored
        earned[ends, lengths[ends] - 1] += batch.rewards[ends].double()
        advantages = discounted_advantages(earned, valued, discount, gae_lambda)
        advantages = advantages.where(scored[:, None], 0.0)
        flat_advantages[places] = advantages[rows, columns]
        flat_returns[places] = (advantages + valued)[rows, columns]
    return flat_advantages.to(batch.values.dtype), flat_returns.to(batch.values.dtype)


def whiten(values: Tensor, epsilon: float) -> Tensor:
    """(x - mean) / (std + epsilon) of a population [n], ddof 1; 0 for one value, or where all are equal."""
    if len(values) < 2 or bool(values.max() == values.min()):
        return values * 0.0
    return (values - values.mean()) / (values.std(correction=1) + epsilon)


def explained_variance(values: Tensor, returns: Tensor) -> float | None:
    """1 - Var(returns - values) / Var(returns) over [n]; None where the returns do not vary."""
    if len(returns) < 2 or bool(returns.max() == returns.min()):
        return None
    return 1.0 - float((returns - values).var() / returns.var())
