"""ppo: advantages against a plain loop, its relation to grpo, and its phases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cases import assert_same, changed, random_case
from plait.algorithms import Setup
from plait.algorithms.gae import estimate_gae, explained_variance, whiten
from plait.algorithms.ppo import Ppo, PpoConfig, value_loss
from plait.engine.batch import collate
from plait.engine.types import (
    PolicyOutput,
    Prompt,
    Rollout,
    RolloutGroup,
    Sampling,
    Score,
    Source,
    StepPlan,
)
from plait.launch.golden_rows import row_sample


def make_ppo(**config) -> Ppo:
    return Ppo(PpoConfig(**config), Setup(Sampling(16), minibatches=2, epochs=3))


def make_rows(kinds):
    return [row_sample(row) for row in random_case(0, "ppo", kinds)["rows"]]


def make_batch(kinds="pphp"):
    batch = collate(make_rows(kinds), torch.float64)
    torch.manual_seed(0)
    return replace(
        batch,
        values=torch.randn(batch.num_tokens, dtype=torch.float64),
        old_logprobs=torch.randn(batch.num_tokens, dtype=torch.float64),
        ref_logprobs=torch.randn(batch.num_tokens, dtype=torch.float64),
    )


def by_hand(rewards, values, discount, gae_lambda):
    """The definition: A_t is the sum over k of (discount lambda)^k delta_(t+k)."""
    n = len(rewards)
    padded = [*values, 0.0]
    delta = [rewards[t] + discount * padded[t + 1] - padded[t] for t in range(n)]
    decay = discount * gae_lambda
    return [sum(decay ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("coef", [0.0, 0.3])
def test_advantages_are_the_definition_row_by_row(coef):
    batch = make_batch()
    found = make_ppo(
        discount=0.97, gae_lambda=0.9, reward_kl_coef=coef, whiten_advantages=False
    ).finish(batch)
    assert found.returns is not None
    assert batch.old_logprobs is not None
    assert batch.ref_logprobs is not None
    assert batch.values is not None
    gap = batch.old_logprobs - batch.ref_logprobs
    for row in range(batch.num_rows):
        start, end = batch.row_starts[row : row + 2].tolist()
        mine = (batch.source[start:end] == Source.POLICY).nonzero().squeeze(-1) + start
        rewards = [-coef * gap[t].item() for t in mine]
        rewards[-1] += batch.rewards[row].item()
        values = batch.values[mine].tolist()
        expected = by_hand(rewards, values, 0.97, 0.9)
        np.testing.assert_allclose(found.advantages[mine], expected, atol=1e-12)
        np.testing.assert_allclose(found.returns[mine], np.add(expected, values), atol=1e-12)
    others = batch.source != Source.POLICY
    assert not found.advantages[others].any()
    assert not found.returns[others].any()


def test_a_row_without_reward_has_no_advantage_and_is_in_no_population():
    batch = make_batch()
    known = make_ppo().finish(batch)
    more = collate(make_rows("pphpp"), torch.float64)
    assert batch.values is not None
    values = torch.cat([batch.values, torch.ones(more.num_tokens - batch.num_tokens)])
    rewards = more.rewards.clone()
    rewards[-1] = float("nan")
    found = make_ppo().finish(replace(more, values=values, rewards=rewards))
    torch.testing.assert_close(found.advantages[: batch.num_tokens], known.advantages)
    assert not found.advantages[batch.num_tokens :].any()


def test_whitening_takes_the_whole_step():
    batch = make_batch()
    trained = batch.is_trained(Source.POLICY)
    advantages = make_ppo().finish(batch).advantages[trained]
    assert advantages.mean().item() == pytest.approx(0, abs=1e-12)
    assert advantages.std(correction=1).item() == pytest.approx(1, abs=1e-5)
    one = torch.tensor([3.0])
    assert whiten(one, 1e-6).tolist() == [0.0]
    assert whiten(one.expand(4), 1e-6).tolist() == [0.0] * 4


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 2.0, 5.0])
    assert explained_variance(returns, returns) == pytest.approx(1)
    assert explained_variance(returns * 0, returns) == pytest.approx(0)
    assert explained_variance(returns, returns * 0) is None
    algorithm = make_ppo()
    assert algorithm.metrics() == {}
    algorithm.finish(make_batch())
    assert algorithm.metrics().keys() == {"explained_variance"}


def test_no_rows_have_no_advantages():
    batch = collate([])
    assert make_ppo().finish(batch) is batch
    empty = replace(make_batch("e"), values=torch.zeros(make_batch("e").num_tokens))
    advantages, returns = estimate_gae(empty, empty.advantages, 1.0, 1.0)
    assert not advantages.any()
    assert not returns.any()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("extra", [{}, {"entropy_coef": 0.02, "kl_coef": 0.05}], ids=["", "terms"])
def test_33_without_a_critic_it_is_grpo_on_plain_rewards(seed, extra):
    plain = {"discount": 1.0, "gae_lambda": 1.0, "whiten_advantages": False, **extra}
    ppo = random_case(seed, "ppo", "pppp", **plain)
    for row in ppo["rows"]:
        row["values"] = [0.0] * len(row["response_ids"])
    grpo = changed(
        ppo, algorithm="grpo", config={"advantage": "none", "normalizer": "tokens", **extra}
    )
    assert_same(ppo, grpo)


def test_37_nothing_trained_gives_zero():
    batch = make_batch()
    batch = replace(batch, weights=batch.weights * 0)
    batch = make_ppo().finish(replace(batch, denom=collate([]).denom))
    assert batch.values is not None
    values = batch.values.clone().requires_grad_()
    result = value_loss(PolicyOutput(values, values=values), batch, {}, config=PpoConfig())
    result.loss.backward()
    assert result.loss.item() == 0
    assert values.grad is not None
    assert not values.grad.any()
    assert result.metrics.keys() == {"value_loss"}


def groups(*rewards):
    prompt = Prompt("p", (), (1, 2))
    rollouts = tuple(
        Rollout("p", i, (3, 4), 0, (-0.1, -0.2), 7, "stop", "") for i in range(len(rewards))
    )
    scores = tuple(Score.unknown("?") if r is None else Score.ok(r) for r in rewards)
    return [RolloutGroup(prompt, rollouts, scores)]


def test_the_critic_warms_up_alone_then_follows_the_policy():
    algorithm = make_ppo(critic_warmup_steps=2, critic_learning_rate=3e-5)
    for step in range(4):
        (update,) = algorithm.assemble(StepPlan(), groups(1.0, None, 0.0), step)
        assert len(update.samples) == 2, "UNKNOWN does not train"
        assert (update.minibatches, update.epochs) == (2, 3)
        if step < 2:
            assert (update.loss, update.learning_rate, update.critic_loss) == ("critic", 3e-5, None)
        else:
            assert (update.loss, update.learning_rate) == ("main", None)
            assert (update.critic_loss, update.critic_learning_rate) == ("critic", 3e-5)


def test_uniform_groups_leave_where_asked():
    (update,) = make_ppo(drop_uniform_groups=True).assemble(StepPlan(), groups(1.0, 1.0), 0)
    assert not any(sample.weights.any() for sample in update.samples)


def test_needs_follow_the_config():
    plain, penalized = make_ppo(), make_ppo(reward_kl_coef=0.1)
    assert plain.needs == {
        "main": {"old_logprobs", "values"},
        "critic": {"values", "new_values"},
    }
    for loss in ("main", "critic"):
        assert {"recorded_logprobs", "ref_logprobs"} <= penalized.needs[loss]
