"""Proof that a wrong formula of luffy, srft, hpt, super_rl, visurf, topr, rift or polychromic misses the reference
numbers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from golden_cases import fails
from plait.algorithms import (
    hpt,
    losses,
    luffy,
    polychromic,
    reward_signed,
    srft,
    super_rl,
    visurf,
)
from plait.engine.types import Source


@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("luffy/loss/default", {"shaping_gamma": None}),
        ("luffy/loss/default", {"shaping_gamma": 0.2}),
        ("luffy/loss/default", {"advantage": "group_std"}),
        ("luffy/loss/default", {"entropy_scope": "policy"}),
        ("srft/loss/paper", {"demo_entropy_sign": 1}),
        ("srft/loss/paper", {"weight_entropy_scope": "token"}),
        ("srft/loss/paper", {"demo_shaping_gamma": 0.1}),
        ("srft/loss/paper", {"success_threshold": 0.0}),
        ("srft/loss/paper", {"rollout_form": "ratio"}),
        ("hpt/loss/one rl prompt, one sft prompt", {"expert_coef": 0.9}),
        ("hpt/loss/one rl prompt, one sft prompt", {"clip_high": 0.1}),
        ("hpt/trace/gate 2", {"solved_gate": 1}),
        ("hpt/trace/gate 0", {"success_threshold": 0.5}),
        ("super_rl/loss/mixed", {"expert_normalizer": "constant"}),
        ("super_rl/loss/mixed", {"normalizer": "tokens"}),
        ("super_rl/trace/gate", {"failure_threshold": 0.1}),
        ("visurf/loss/strong model: label smoothed", {"smooth_expert_reward": False}),
        ("visurf/advantage/weak and strong", {"smooth_expert_reward": False}),
        ("topr/loss/default", {"negative_ratio_high": 0.5}),
        ("topr/loss/default", {"positive_ratio_high": 9.0, "positive_ratio_low": 0.0}),
        ("topr/loss/baseline, split", {"reward_baseline": 0.0}),
        ("rift/loss/default", {"negative_reward": -0.3}),
        ("polychromic/loss/sets of 2", {"set_size": 3}),
        ("polychromic/loss/split", {"set_size": 1}),
        ("polychromic/loss/split", {"max_sets_per_group": 1}),
        ("polychromic/loss/sets of 2", {"normalizer": "tokens"}),
        ("polychromic/loss/sets of 2", {"clip_high": None}),
        ("polychromic/trace/given and all sets", {"set_size": 2}),
        ("rift/loss/row mean, split", {"probability_scope": "row_sum"}),
        ("rift/loss/row mean, split", {"probability_scope": "token", "normalizer": "rows"}),
    ],
)
def test_another_constant_fails(case, config):
    assert fails(case, **config)


def test_luffys_shaping_as_a_constant_fails(monkeypatch):
    monkeypatch.setattr(luffy, "shape", lambda p, gamma: (p / (p + gamma)).detach())
    assert fails("luffy/loss/default")


def test_a_demonstration_outside_the_statistics_fails(monkeypatch):
    """Only rollouts in the population; the demonstration keeps its reward as advantage."""
    credit = luffy.credit_groups

    def apart(samples, config, sources):
        policy = [s for s in samples if (s.source == Source.POLICY).any()]
        expert = [s for s in samples if not (s.source == Source.POLICY).any()]
        return credit(policy, config, sources) + credit(expert, config, sources)

    monkeypatch.setattr(luffy, "credit_groups", apart)
    monkeypatch.setattr(srft, "credit_groups", apart)
    monkeypatch.setattr(visurf, "credit_groups", apart)
    assert fails("luffy/loss/default")
    assert fails("srft/loss/paper")
    assert fails("visurf/loss/weak model")


def test_demonstrations_in_a_denominator_of_their_own_fail(monkeypatch):
    monkeypatch.setattr(losses.Members, "all", losses.Members.policy)
    assert fails("luffy/loss/default")
    assert fails("visurf/loss/weak model")


@pytest.mark.parametrize("case", ["srft/loss/paper", "srft/loss/token entropy, split"])
def test_gradient_through_srfts_weights_fails(monkeypatch, case):
    def attached(out, batch, scope):
        if scope == "token":
            return out.entropy
        counts = losses.sum_rows(batch.trained.double(), batch).clamp(min=1)
        return (losses.sum_rows(out.entropy, batch) / counts)[batch.row_ids]

    monkeypatch.setattr(srft, "weight_entropy", attached)
    assert fails(case)


def test_srfts_constant_with_rows_of_one_kind_fails(monkeypatch):
    monkeypatch.setattr(
        srft,
        "normalize",
        lambda values, batch, members, config: members.normalize(
            values, batch, config.normalizer, config.max_response_length
        ),
    )
    assert fails("srft/loss/hpt_repo")
    assert not fails("srft/loss/paper")


def test_right_rollouts_without_their_entropy_weight_fail(monkeypatch):
    component = srft.rollout_component
    monkeypatch.setattr(
        srft,
        "rollout_component",
        lambda out, batch, weights, config: component(out, batch, weights * 0 + 1, config),
    )
    assert fails("srft/loss/paper")


def test_a_strict_gate_fails(monkeypatch):
    monkeypatch.setattr(
        hpt,
        "choose_route",
        lambda rewards, config: (
            "sft"
            if hpt.count_solved(rewards, config.success_threshold) < config.solved_gate
            else "rl"
        ),
    )
    assert fails("hpt/trace/gate 0")
    assert fails("hpt/trace/gate 2")


def test_a_gate_on_the_mean_reward_fails(monkeypatch):
    monkeypatch.setattr(
        super_rl,
        "choose_route",
        lambda rewards, config: "sft" if sum(rewards) / len(rewards) < 0.5 else "rl",
    )
    assert fails("super_rl/trace/gate")


def test_a_share_of_rows_instead_of_prompts_fails(monkeypatch):
    def of_rows(samples):
        experts = [s for s in samples if not (s.source == Source.POLICY).any()]
        return len(experts) / len(samples)

    monkeypatch.setattr(super_rl, "expert_share", of_rows)
    assert fails("super_rl/loss/mixed")
    assert fails("super_rl/loss/split")


def test_a_smoothed_reward_that_stays_the_experts_fails(monkeypatch):
    monkeypatch.setattr(
        visurf,
        "smoothed_reward",
        lambda expert, rollouts: expert if rollouts and max(rollouts) >= expert else None,
    )
    assert fails("visurf/advantage/weak and strong")


def test_smoothing_only_above_the_expert_fails(monkeypatch):
    monkeypatch.setattr(
        visurf,
        "smoothed_reward",
        lambda expert, rollouts: (
            sum(rollouts) / len(rollouts) if rollouts and max(rollouts) > expert else None
        ),
    )
    assert fails("visurf/loss/strong model: label smoothed")


def test_a_taper_of_each_token_fails(monkeypatch):
    monkeypatch.setattr(
        reward_signed,
        "taper",
        lambda logprobs, written, advantages, members, batch, fields: (
            (logprobs - written).where(members.mask, 0.0).detach().exp().clamp(0, 1)
        ),
    )
    assert fails("topr/loss/default")


def test_wrong_rows_by_their_log_probability_fail(monkeypatch):
    """Unbounded below, as plain negative SFT is: exp(log p) must not become log p."""

    class Logprobs:
        def __init__(self, values):
            self.values = values

        def where(self, mask, other):
            return self.values

        def exp(self):
            return self.values

    scoped = reward_signed.scoped_logprobs
    monkeypatch.setattr(reward_signed, "scoped_logprobs", lambda *args: Logprobs(scoped(*args)))
    assert fails("rift/loss/default")
    assert fails("rift/loss/row mean, split")


POLYCHROMIC = ("polychromic/loss/sets of 2", "polychromic/trace/given and all sets")


@pytest.mark.parametrize("case", POLYCHROMIC)
def test_sets_without_their_diversity_fail(monkeypatch, case):
    right = polychromic.credit_sets

    def blind(rewards, signatures, sets, size):
        return right(rewards, [str(i) for i in range(len(rewards))], sets, size)

    monkeypatch.setattr(polychromic, "credit_sets", blind)
    assert fails(case)


@pytest.mark.parametrize("case", POLYCHROMIC)
def test_set_advantages_without_a_mean_fail(monkeypatch, case):
    monkeypatch.setattr(polychromic, "center", list)
    assert fails(case)


@pytest.mark.parametrize("case", POLYCHROMIC)
def test_the_sum_over_a_rows_sets_instead_of_the_mean_fails(monkeypatch, case):
    right = polychromic.credit_sets

    def summed(rewards, signatures, sets, size):
        found = right(rewards, signatures, sets, size)
        counts = [sum(i in rows for rows in sets) for i in range(len(rewards))]
        advantages = [a * n for a, n in zip(found.advantages, counts, strict=True)]
        return replace(found, advantages=advantages)

    monkeypatch.setattr(polychromic, "credit_sets", summed)
    assert fails(case)


def test_sets_across_groups_fail(monkeypatch):
    credit = polychromic.Polychromic.credit

    def as_one(self, samples, step=0):
        rows = credit(self, [replace(s, group_id="all") for s in samples], step)
        return [replace(row, group_id=s.group_id) for row, s in zip(rows, samples, strict=True)]

    monkeypatch.setattr(polychromic.Polychromic, "credit", as_one)
    assert fails("polychromic/loss/split")
