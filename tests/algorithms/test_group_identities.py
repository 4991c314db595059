"""Relations of the methods that put demonstrations into groups, switch by group, or weight rows by their reward.

Numbers refer to the list in docs/algorithms/index.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cases import assert_same, changed, on_policy, random_case, relabelled, solve
from plait.algorithms.luffy import shape
from plait.launch.golden import run_loss

SEEDS = range(4)
DR_GRPO = {
    "advantage": "group_mean",
    "normalizer": "constant",
    "clip_low": None,
    "clip_high": None,
    "max_response_length": 7,
}
REGULARIZED = {"entropy_coef": 0.02, "entropy_scope": "all", "kl_coef": 0.05}


def with_rewards(case: dict[str, Any], *rewards: float) -> dict[str, Any]:
    case = changed(case)
    for row, reward in zip(case["rows"], rewards, strict=True):
        row["reward"] = reward
    return case


@pytest.mark.parametrize("seed", SEEDS)
def test_09_luffy_without_demonstrations_is_dr_grpo_with_entropy(seed):
    luffy = random_case(seed, "luffy", "pppp", max_response_length=7)
    assert_same(luffy, random_case(seed, "grpo", "pppp", **DR_GRPO, entropy_coef=0.001))


@pytest.mark.parametrize("gamma", [0.05, 0.1, 0.5])
def test_10_the_factor_of_the_shaped_ratio_peaks_at_gamma(gamma):
    p = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    logprobs = p.log().requires_grad_()
    shape(logprobs.exp(), gamma).sum().backward()
    factor = logprobs.grad
    assert factor is not None
    torch.testing.assert_close(factor, gamma * p / (p + gamma) ** 2)
    assert p[factor.argmax()].item() == pytest.approx(gamma, abs=1e-3)
    assert factor.max().item() == pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize("scope", ["token", "row"])
@pytest.mark.parametrize("seed", SEEDS)
def test_11_srft_without_demonstrations_is_its_rollout_term_and_entropy(seed, scope):
    case = random_case(seed, "srft", "pppp", weight_entropy_scope=scope)
    expected, entropies = [], []
    for row in case["rows"]:
        logits = np.asarray(row["logits"])
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        entropy = -(np.exp(logp) * logp).sum(-1)
        h = entropy if scope == "token" else entropy.mean()
        a = 0.1 * np.exp(h) if row["reward"] == 1 else -1.0
        expected += list(-a * logp[np.arange(len(logp)), row["response_ids"]])
        entropies += list(entropy)
    result = run_loss(case)
    assert result["metrics"]["rollout_loss"] == pytest.approx(np.mean(expected))
    assert result["loss"] == pytest.approx(np.mean(expected) - 0.001 * np.mean(entropies))
    other = {**case["config"], "demo_weight_scale": 9.0, "demo_shaping_gamma": 0.3}
    assert_same(case, changed(case, config=other))


@pytest.mark.parametrize("seed", SEEDS)
def test_12_on_policy_the_ratio_form_has_the_gradient_of_the_logprob_form(seed):
    case = on_policy(random_case(seed, "srft", "ppppdd"))
    assert_same(case, changed(case, config={"rollout_form": "ratio"}), loss=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_13_hpt_is_dr_grpo_or_sft(seed):
    hpt = random_case(seed, "hpt", "pppp", max_response_length=7)
    assert_same(hpt, random_case(seed, "grpo", "pppp", **DR_GRPO, entropy_coef=0.001))
    gated = random_case(seed, "hpt", "eee")
    assert_same(gated, random_case(seed, "sft", "eee", entropy_coef=0.001))
    loss, grads = solve(changed(gated, config={"expert_coef": 0.3, "entropy_coef": 0.0}))
    sft_loss, sft_grads = solve(random_case(seed, "sft", "eee"))
    assert loss == pytest.approx(0.3 * sft_loss)
    for a, b in zip(grads, sft_grads, strict=True):
        np.testing.assert_allclose(a, 0.3 * b, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_20_super_rl_is_grpo_or_sft(seed):
    assert_same(random_case(seed, "super_rl", "pppp"), random_case(seed, "grpo", "pppp"))
    gated = random_case(seed, "super_rl", "eee")
    assert_same(gated, random_case(seed, "sft", "eee", normalizer="rows"))


@pytest.mark.parametrize("seed", SEEDS)
def test_22_visurf_without_labels_is_grpo(seed):
    assert_same(random_case(seed, "visurf", "pppp"), random_case(seed, "grpo", "pppp"))


@pytest.mark.parametrize("seed", SEEDS)
def test_22_a_smoothed_label_gets_no_gradient(seed):
    _, grads = solve(
        random_case(seed, "visurf", "ppppdd")
    )  # each group holds a rollout as good as its label
    assert all((grad == 0).all() for grad in grads[4:])
    assert any((grad != 0).any() for grad in grads[:4])


@pytest.mark.parametrize("seed", SEEDS)
def test_23_an_unsmoothed_label_is_one_more_rollout(seed):
    bounds = {"clip_low": None, "clip_high": 9.0}
    visurf = with_rewards(
        random_case(seed, "visurf", "ppppdd", **bounds), 0.0, 0.2, 0.5, 0.0, 1.0, 1.0
    )
    grpo = {**relabelled(visurf, "policy"), "algorithm": "grpo"}
    assert_same(visurf, grpo)
    assert all((grad != 0).any() for grad in solve(visurf)[1][4:])


@pytest.mark.parametrize("seed", SEEDS)
def test_24_on_policy_topr_is_reinforce(seed):
    topr = on_policy(random_case(seed, "topr", "pppp", max_response_length=7))
    config = {"advantage": "none", "normalizer": "constant", "max_response_length": 7}
    assert_same(topr, {**topr, "algorithm": "grpo", "config": config}, loss=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_toprs_taper_is_a_constant_of_the_row(seed):
    """Wrong rows of sequence ratio q < 1 have q times the gradient of REINFORCE; right ones have it whole."""
    topr = on_policy(random_case(seed, "topr", "pppp", max_response_length=7))
    topr = with_rewards(topr, -1.0, -1.0, 1.0, 1.0)
    _, plain = solve(topr)
    drifted = changed(topr)
    gaps = [0.3, -0.3, 0.7, -0.7]
    for row, gap in zip(drifted["rows"], gaps, strict=True):
        n = len(row["old_logprobs"])
        row["old_logprobs"] = [value + gap / n for value in row["old_logprobs"]]
    _, grads = solve(drifted)
    for alpha, a, b in zip([np.exp(-0.3), 1, 1, 1], plain, grads, strict=True):
        np.testing.assert_allclose(b, alpha * a, atol=1e-12)
    alphas = [np.exp(-0.3), 1, 1, 1]
    assert run_loss(drifted)["metrics"]["taper_mean"] == pytest.approx(np.mean(alphas))


@pytest.mark.parametrize("seed", SEEDS)
def test_26_rift_on_right_rows_is_sft(seed):
    rift = random_case(seed, "rift", "pppp", entropy_coef=0.02)
    rift = with_rewards(rift, 1.0, 1.0, 1.0, 1.0)
    assert_same(rift, {**relabelled(rift, "expert"), "algorithm": "sft"})


@pytest.mark.parametrize("kinds", ["pppp", "pppppp"])
@pytest.mark.parametrize("seed", SEEDS)
def test_27_polychromic_with_sets_of_one_is_grpo(seed, kinds):
    case = random_case(seed, "polychromic", kinds, set_size=1, **REGULARIZED)
    assert_same(case, random_case(seed, "grpo", kinds, advantage="group_mean", **REGULARIZED))


@pytest.mark.parametrize("size", [1, 2])
def test_35_equal_rewards_and_answers_train_nothing(size):
    case = random_case(0, "polychromic", "pppppp", set_size=size)
    for row in case["rows"]:
        row |= {"reward": 0.3, "signature": "x"}
    loss, grads = solve(case)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)
    case["rows"][0]["signature"] = "y"  # a set with it holds two answers
    assert (solve(case)[0] != 0) == (size == 2)


@pytest.mark.parametrize("algorithm", ["srft", "topr", "rift"])
def test_35_methods_that_train_on_equal_rewards(algorithm):
    case = random_case(0, algorithm, "pppp", entropy_coef=0.0)
    loss, grads = solve(with_rewards(case, 1.0, 1.0, 1.0, 1.0))
    assert loss != 0
    assert all((grad != 0).any() for grad in grads)


@pytest.mark.parametrize("scope", ["row_mean", "row_sum"])
def test_rift_on_one_token_rows_does_not_depend_on_the_scope(scope):
    case = random_case(7, "rift", "pppp")
    for row in case["rows"]:
        for key in ("response_ids", "logits", "old_logprobs", "rollout_logprobs", "ref_logprobs"):
            row[key] = row[key][:1]
    assert_same(case, changed(case, config={"probability_scope": scope}))
