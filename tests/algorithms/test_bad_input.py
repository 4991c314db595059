"""What data and verifiers get wrong, through hybrids, sft and grpo: finite losses, right counts, seen in metrics."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bad_steps import METHODS, ROLLING, SIZE, measure, solve, take_step


@pytest.mark.parametrize("rewards", [[0.0] * SIZE, [1.0] * SIZE], ids=["wrong", "right"])
@pytest.mark.parametrize("name", ROLLING)
def test_equal_rewards(name, rewards):
    updates, groups = take_step(name, rewards)
    for update in updates:
        solve(name, update)
    metrics = measure(updates, groups)
    assert metrics["groups/uniform"] == 1
    assert metrics["groups/all_wrong"] == (rewards[0] == 0)


@pytest.mark.parametrize("name", ROLLING)
def test_a_group_of_one_known_score(name):
    updates, groups = take_step(name, [1.0, None, None, None])
    for update in updates:
        solve(name, update)
    metrics = measure(updates, groups)
    assert metrics["groups/single"] == metrics["groups/partly_unknown"] == 1
    assert metrics["groups/unknown"] == 0


@pytest.mark.parametrize("name", ROLLING)
def test_unknown_for_some_leaves_the_others(name):
    updates, groups = take_step(name, [1.0, None, 0.0, 1.0])
    unknown = sum(s.reward is None for group in groups for s in group.scores)
    known = sum(s.reward is not None for group in groups for s in group.scores)
    batch, _ = solve(name, updates[0])
    assert batch.denom.policy_rows == known
    assert batch.denom.policy_tokens == 2 * known
    assert measure(updates, groups)["reward/unknown"] == unknown == 1


@pytest.mark.parametrize("name", ROLLING)
def test_unknown_for_all_trains_no_rollout(name):
    updates, groups = take_step(name, [None] * SIZE)
    for update in updates:
        batch, _ = solve(name, update)
        assert batch.denom.policy_tokens == 0
    metrics = measure(updates, groups)
    assert metrics["groups/unknown"] == 1
    assert "reward/mean" not in metrics
    # chord's stream of demonstrations does not depend on the rollouts.
    assert metrics["updates/untrained"] == (0 if name == "chord" else 1)
    assert metrics["rows/trained"] == (1 if name == "chord" else 0)


@pytest.mark.parametrize("name", [n for n in ROLLING if n != "sasr"])
def test_without_expert_rows(name):
    updates, groups = take_step(name, [1.0, 0.0, 0.0, 1.0], demonstrated=False)
    (update,) = updates
    batch, moved = solve(name, update)
    assert (batch.denom.expert_tokens, batch.denom.expert_rows) == (0, 0)
    assert (batch.denom.policy_tokens, batch.denom.policy_rows) == (2 * SIZE, SIZE)
    assert moved > 0
    assert measure(updates, groups)["rows/expert"] == 0


@pytest.mark.parametrize("name", ["sft", "one_token_rollout", "hpt", "super_rl", "sasr"])
def test_with_only_expert_rows(name):
    updates, groups = take_step(name, [0.0] * SIZE, step=0 if name == "sasr" else 1)
    (update,) = updates
    batch, moved = solve(name, update)
    assert (batch.denom.policy_tokens, batch.denom.policy_rows) == (0, 0)
    assert (batch.denom.expert_tokens, batch.denom.expert_rows) == (7, 1)
    assert moved > 0
    assert measure(updates, groups)["rows/expert"] == 1


@pytest.mark.parametrize("name", METHODS)
def test_fully_masked_rows_train_nothing_and_are_counted(name):
    updates, groups = take_step(name, [1.0, 0.0, 0.0, 1.0])
    masked = [
        replace(u, samples=tuple(replace(s, weights=s.weights * 0) for s in u.samples))
        for u in updates
    ]
    for update in masked:
        batch, moved = solve(name, update)
        assert batch.denom.tokens == batch.denom.rows == 0
        assert moved == 0
    metrics = measure(masked, groups)
    assert metrics["rows/trained"] == 0
    assert metrics["rows/untrained"] == sum(len(update.samples) for update in masked)
    assert metrics["updates/untrained"] == len(masked)
