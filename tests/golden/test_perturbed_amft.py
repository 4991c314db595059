"""Proof that a wrong formula of amft misses the reference numbers."""

import pytest

from golden_cases import fails
from plait.algorithms import amft, chord, losses


@pytest.mark.parametrize("case", ["amft/loss/default mu", "amft/loss/mu 0.8, split"])
def test_a_wrong_denominator_fails(monkeypatch, case):
    mean = losses.Members.mean
    monkeypatch.setattr(losses.Members, "mean", lambda self, values: mean(self, values) * 1.01)
    assert fails(case)


def test_policy_and_expert_weights_the_wrong_way_round_fail(monkeypatch):
    loss = chord.chord_loss

    def swapped(out, batch, coefs, *, config):
        return loss(out, batch, {**coefs, "mu": 1 - coefs["mu"]}, config=config)

    monkeypatch.setattr(amft, "chord_loss", swapped)
    assert fails("amft/loss/mu 0.8, split")


@pytest.mark.parametrize(
    "config", [{"entropy_coef": 0.0}, {"entropy_scope": "all"}, {"advantage": "group_mean"}]
)
def test_another_setting_fails(config):
    assert fails("amft/loss/default mu", **config)


@pytest.mark.parametrize("case", ["amft/trace/controller", "amft/trace/raw"])
def test_the_sign_of_the_meta_gradient_matters(monkeypatch, case):
    right = amft.meta_gradient
    monkeypatch.setattr(amft, "meta_gradient", lambda *args: -right(*args))
    assert fails(case)


def test_the_sign_of_the_entropy_error_matters(monkeypatch):
    right = amft.next_mu

    def wrong(mu, meta, entropy, target, config):
        return right(mu, meta, target, entropy, config)

    monkeypatch.setattr(amft, "next_mu", wrong)
    assert fails("amft/trace/raw")


def test_cosine_and_raw_differ():
    assert fails("amft/trace/raw", meta_gradient="cosine")
    assert fails("amft/trace/controller", meta_gradient="raw")
