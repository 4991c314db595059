"""Relations between algorithms that hold for any rows (numbers refer to the list in docs/algorithms/index.md)."""

import itertools

import numpy as np
import pytest

from cases import assert_same, changed, on_policy, random_case, solve
from plait.algorithms.advantages import estimate_advantages

SEEDS = range(4)
ALL_TERMS = {"entropy_coef": 0.01, "kl_coef": 0.05, "sampler_ratio_cap": 1.5, "dual_clip": 3.0}
ALGORITHMS = {
    "sft": {"entropy_coef": 0.02},
    "grpo": ALL_TERMS,
    "amft": ALL_TERMS,
    "chord": ALL_TERMS,
}


@pytest.mark.parametrize("seed", SEEDS)
def test_01_chord_with_mu_0_is_grpo(seed):
    chord = changed(random_case(seed, "chord"), coefs={"mu": 0.0})
    grpo = changed(random_case(seed, "grpo", normalizer="tokens"))
    assert_same(chord, grpo)
    assert all((grad == 0).all() for grad in solve(chord)[1][4:])


@pytest.mark.parametrize("seed", SEEDS)
def test_02_chord_with_mu_1_is_sft(seed):
    chord = changed(random_case(seed, "chord"), coefs={"mu": 1.0})
    assert_same(chord, random_case(seed, "sft"))


@pytest.mark.parametrize("seed", SEEDS)
def test_03_phi_gradient_is_nll_gradient_times_p_1_minus_p(seed):
    nll = random_case(seed, "sft", kinds="ee")
    _, plain = solve(nll)
    _, weighted = solve(changed(nll, config={"expert_loss": {"type": "phi"}}))
    for row, a, b in zip(nll["rows"], plain, weighted, strict=True):
        logits = np.asarray(row["logits"])
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        p = p[np.arange(len(p)), row["response_ids"]]
        np.testing.assert_allclose(b, a * (p * (1 - p))[:, None], atol=1e-12)
        assert (np.abs(b) <= np.abs(a) / 4 + 1e-12).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_28_an_inactive_dual_clip_changes_nothing(seed):
    case = random_case(seed, "grpo")
    assert_same(case, changed(case, config={"dual_clip": 1e6}))


@pytest.mark.parametrize("seed", SEEDS)
def test_29_on_one_token_rows_the_sequence_ratio_is_the_token_ratio(seed):
    case = random_case(seed, "grpo", kinds="pppp")
    for row in case["rows"]:
        for key in ("response_ids", "logits", "old_logprobs", "rollout_logprobs", "ref_logprobs"):
            row[key] = row[key][:1]
    assert_same(case, changed(case, config={"ratio_level": "sequence"}))


def test_30_leave_one_out_is_group_mean_rescaled():
    rewards, groups = [1.0, 0.0, 0.5, 0.0, 1.0, 0.0], ["a"] * 4 + ["b"] * 2
    mean = estimate_advantages(rewards, groups, "group_mean")
    out = estimate_advantages(rewards, groups, "leave_one_out")
    for value, base, size in zip(out, mean, [4] * 4 + [2] * 2, strict=True):
        assert value == pytest.approx(size / (size - 1) * base)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("config", [{}, {"ratio_level": "sequence"}, {"dual_clip": 3.0}])
def test_31_the_first_update_is_the_unclipped_policy_gradient(seed, config):
    case = on_policy(random_case(seed, "grpo"))
    free = changed(case, config={"clip_low": None, "clip_high": None})
    assert_same(changed(case, config=config), free, loss=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_32_doubling_the_constant_halves_the_component(seed):
    config = {"normalizer": "constant", "max_response_length": 8}
    case = random_case(seed, "grpo", **config)
    loss, grads = solve(case)
    halved, half_grads = solve(changed(case, config={**config, "max_response_length": 16}))
    assert halved == pytest.approx(loss / 2)
    for a, b in zip(grads, half_grads, strict=True):
        np.testing.assert_allclose(a / 2, b, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_34_equal_sampler_and_learner_need_no_correction(seed):
    case = random_case(seed, "grpo")
    for row in case["rows"]:
        row["rollout_logprobs"] = row["old_logprobs"]
    assert_same(case, changed(case, config={"sampler_ratio_cap": 2.0}))
    for row in case["rows"]:
        row["rollout_logprobs"] = [value - 50 for value in row["old_logprobs"]]
    loss, _ = solve(case)
    assert solve(changed(case, config={"sampler_ratio_cap": 2.0}))[0] == pytest.approx(2 * loss)


def test_corrections_of_sampler_and_learner_by_their_definition():
    """grpo without group effects: the loss is a sum of token losses times a weight."""
    row = {
        "source": "policy",
        "group": "a",
        "reward": 1.0,
        "response_ids": [0, 1, 2],
        "logits": [[0.0] * 6] * 3,
        "old_logprobs": [-np.log(6)] * 3,
        "rollout_logprobs": list(-np.log(6) - np.log([1.5, 4.0, 0.25])),
    }
    config = {"advantage": "none", "clip_low": None, "clip_high": None, "normalizer": "tokens"}
    case = {"algorithm": "grpo", "rows": [row]}
    expected = {
        ("token", "truncate", 2.0): -(1.5 + 2.0 + 0.25) / 3,
        ("token", "mask", 2.0): -(1.5 + 0.0 + 0.25) / 3,
        ("sequence", "truncate", 2.0): -1.5,
        ("sequence", "truncate", 1.2): -1.2,
        ("sequence", "mask", 1.2): 0.0,
        ("sequence", "mask", 1.5001): -1.5,
    }
    for (level, mode, cap), loss in expected.items():
        own = {"sampler_ratio_level": level, "sampler_ratio_mode": mode, "sampler_ratio_cap": cap}
        assert solve({**case, "config": {**config, **own}})[0] == pytest.approx(loss), own


@pytest.mark.parametrize(("algorithm", "config"), ALGORITHMS.items())
def test_gradient_agrees_with_finite_differences(algorithm, config):
    """Differences of a loss whose constants are frozen: weights such as phi are evaluated once, at the centre."""
    case = random_case(6, algorithm, **config)
    _, grads = solve(case)
    step = 1e-6
    for row, t, v in itertools.product(range(6), range(2), range(0, 6, 2)):
        if t >= len(case["rows"][row]["logits"]):
            continue
        sides = []
        for sign in (1, -1):
            moved = changed(case)
            moved["rows"][row]["logits"][t][v] += sign * step
            sides.append(solve(moved)[0])
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(grads[row][t, v], abs=1e-7)
