"""Proof that a wrong formula of ppo misses the reference numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from golden_cases import CASES, case_of, fails
from plait.algorithms import gae, losses, ppo
from plait.engine.types import LossOutput
from plait.launch import golden_critic
from plait.launch.golden import check_case

GAE, DEFAULT, CRITIC = "ppo/advantage/gae, not whitened", "ppo/loss/default", "ppo/loss/critic"


@pytest.mark.parametrize("case", [GAE, DEFAULT])
@pytest.mark.parametrize("config", [{"discount": 0.99}, {"gae_lambda": 1.0}])
def test_other_discounts_fail(case, config):
    assert fails(case, **config)


def test_a_bootstrapped_end_fails(monkeypatch):
    """The value of the last token's own state stands for what follows it."""
    estimate = gae.discounted_advantages

    def wrong(rewards, values, discount, gae_lambda):
        ended = rewards.clone()
        last = (values != 0).sum(1) - 1
        rows = range(len(rewards))
        ended[rows, last] += discount * values[rows, last]
        return estimate(ended, values, discount, gae_lambda)

    monkeypatch.setattr(gae, "discounted_advantages", wrong)
    assert fails(GAE)
    assert fails(DEFAULT)


def test_the_reward_on_every_token_fails(monkeypatch):
    estimate = gae.discounted_advantages

    def wrong(rewards, values, *discounts):
        spread = rewards.sum(1, keepdim=True).expand_as(rewards)
        return estimate(spread * (values != 0), values, *discounts)

    monkeypatch.setattr(gae, "discounted_advantages", wrong)
    assert fails(GAE)
    assert fails(DEFAULT)


def test_returns_of_whitened_advantages_fail():
    """What whitening changes: with it, the same case has other advantages."""
    assert fails(GAE, whiten_advantages=True)
    assert fails(DEFAULT, whiten_advantages=False)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, epsilon: (x - x.mean()) / (x.std(correction=0) + epsilon),
        lambda x, epsilon: x / (x.std() + epsilon),
        lambda x, epsilon: (x - x.mean()) / (x.std() + 1e-2),
    ],
    ids=["ddof 0", "not centred", "another epsilon"],
)
def test_other_whitening_fails(monkeypatch, wrong):
    monkeypatch.setattr(ppo, "whiten", wrong)
    assert fails(DEFAULT)


def value_loss_with(error):
    """The value loss with another error of each token."""

    def wrong(out, batch, coefs, *, config):
        members = losses.Members.policy(batch)
        v, old, returns = (
            column.where(members.mask, 0.0) for column in (out.values, batch.values, batch.returns)
        )
        bounded = v.clamp(old - config.value_clip, old + config.value_clip)
        loss = members.normalize(error(v, bounded, returns), batch, "tokens", 1)
        fraction = ((bounded - returns) ** 2 > (v - returns) ** 2).double()
        return LossOutput(
            loss, {"value_loss": loss.detach(), "value_clip_fraction": members.mean(fraction)}
        )

    return wrong


def test_the_stand_in_itself_is_right(monkeypatch):
    right = value_loss_with(lambda v, b, r: 0.5 * (v - r).abs().maximum((b - r).abs()) ** 2)
    monkeypatch.setattr(ppo, "value_loss", right)
    assert check_case(CASES[CRITIC]).ok


@pytest.mark.parametrize(
    "error",
    [
        lambda v, b, r: (v - r).abs().maximum((b - r).abs()) ** 2,
        lambda v, b, r: 0.5 * (v - r).abs().minimum((b - r).abs()) ** 2,
        lambda v, b, r: 0.5 * (v - r) ** 2,
        lambda v, b, r: 0.5 * (b - r) ** 2,
    ],
    ids=["without the half", "the smaller error", "never clipped", "always clipped"],
)
def test_other_value_losses_fail(monkeypatch, error):
    monkeypatch.setattr(ppo, "value_loss", value_loss_with(error))
    assert fails(CRITIC)


def test_values_clipped_around_the_returns_fail(monkeypatch):
    loss = ppo.value_loss

    def wrong(out, batch, coefs, *, config):
        return loss(out, replace(batch, values=batch.returns), coefs, config=config)

    monkeypatch.setattr(ppo, "value_loss", wrong)
    assert fails(CRITIC)


def test_denominators_of_the_micro_batch_fail(monkeypatch):
    from plait.engine import batch as batching

    def local(batch, rows):
        part = batching.select(batch, rows)
        return replace(part, denom=batching.count(part))

    split = {**case_of(CRITIC), "micro_batches": [[0, 2], [1]]}
    assert check_case(split).ok
    monkeypatch.setattr(golden_critic, "select", local)
    assert fails(split)
