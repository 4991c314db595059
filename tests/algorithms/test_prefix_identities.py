"""Relations of uft, prefix_rft, relift, sasr, one_token_rollout that hold for any rows (docs/algorithms/index.md)."""

import numpy as np
import pytest

from cases import VOCABULARY, assert_same, changed, random_case, relabelled, solve

SEEDS = range(4)
DR_GRPO = {"advantage": "group_mean", "normalizer": "constant", "max_response_length": 7}
FREE = {"clip_low": None, "clip_high": None}
ENTROPY = {"entropy_coef": 0.001}


@pytest.mark.parametrize("seed", SEEDS)
def test_04_uft_without_hints_is_grpo(seed):
    terms = {"entropy_coef": 0.001, "kl_coef": 0.001}
    uft = random_case(seed, "uft", kinds="pppp")
    assert_same(uft, random_case(seed, "grpo", kinds="pppp", normalizer="tokens", **terms))


@pytest.mark.parametrize("seed", SEEDS)
def test_05_uft_with_demonstrations_only_is_scaled_sft(seed):
    loss, grads = solve(random_case(seed, "uft", kinds="eee", expert_coef=0.25))
    sft_loss, sft_grads = solve(random_case(seed, "sft", kinds="eee"))
    assert loss == pytest.approx(0.25 * sft_loss)
    for a, b in zip(grads, sft_grads, strict=True):
        np.testing.assert_allclose(a, 0.25 * b, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_06_prefix_rft_without_prefixes_is_dr_grpo(seed):
    prefix_rft = random_case(seed, "prefix_rft", kinds="pppp", max_response_length=7)
    grpo = random_case(seed, "grpo", kinds="pppp", dual_clip=3.0, **DR_GRPO, **ENTROPY)
    assert_same(prefix_rft, grpo)


@pytest.mark.parametrize("seed", SEEDS)
def test_07_prefix_rft_that_keeps_all_is_grpo_on_relabelled_rows(seed):
    config = {"entropy_keep_fraction": 1.0, "entropy_coef": 0.0, "max_response_length": 7}
    case = random_case(seed, "prefix_rft", "pppphh", **config)
    grpo = {**relabelled(case, "policy"), "algorithm": "grpo"}
    assert_same(case, {**grpo, "config": {"dual_clip": 3.0, **DR_GRPO}})


@pytest.mark.parametrize("seed", SEEDS)
def test_08_prefix_rft_that_keeps_nothing_leaves_the_prefix_alone(seed):
    case = random_case(seed, "prefix_rft", "pppphh", entropy_keep_fraction=0.0, entropy_coef=0.0)
    for row, grad in zip(case["rows"], solve(case)[1], strict=True):
        assert (grad[: row["prefix_len"]] == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_14_relift_main_is_dr_grpo_without_clipping(seed):
    relift = random_case(seed, "relift", kinds="pppp", max_response_length=7)
    assert_same(relift, random_case(seed, "grpo", kinds="pppp", **DR_GRPO, **FREE, **ENTROPY))


@pytest.mark.parametrize("seed", SEEDS)
def test_15_relift_sft_is_sft(seed):
    relift = random_case(seed, "relift", kinds="eee", expert_entropy_coef=0.03)
    sft = random_case(seed, "sft", kinds="eee", entropy_coef=0.03)
    assert_same(changed(relift, update="sft"), sft)


@pytest.mark.parametrize("seed", SEEDS)
def test_16_sasr_main_is_grpo_and_sasr_sft_is_sft(seed):
    main = random_case(seed, "sasr", kinds="pppp")
    assert_same(main, random_case(seed, "grpo", kinds="pppp", kl_coef=0.04))
    sft = changed(random_case(seed, "sasr", kinds="eee"), update="sft")
    assert_same(sft, random_case(seed, "sft", kinds="eee"))


@pytest.mark.parametrize("miss_reward", [0.0, -0.1, 0.4])
@pytest.mark.parametrize("seed", SEEDS)
def test_17_exact_one_token_rollout_is_scaled_dft(seed, miss_reward):
    exact = {"exact_expectation": True, "sampling_temperature": 1.0, "miss_reward": miss_reward}
    _, grads = solve(random_case(seed, "one_token_rollout", kinds="eee", **exact))
    _, dft = solve(random_case(seed, "sft", kinds="eee", expert_loss={"type": "dft"}))
    for a, b in zip(grads, dft, strict=True):
        np.testing.assert_allclose(a, (1 - miss_reward) * b, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_18_samples_equal_to_the_target_are_sft(seed):
    case = random_case(seed, "one_token_rollout", kinds="eee")
    for row in case["rows"]:
        row["samples"] = [[token] * 5 for token in row["response_ids"]]
    assert_same(case, random_case(seed, "sft", kinds="eee"))


def test_19_many_samples_approach_the_expectation():
    case = random_case(0, "one_token_rollout", kinds="ee")
    rng = np.random.default_rng(0)
    for row in case["rows"]:
        p = np.exp(np.asarray(row["logits"]) / 1.3)
        p /= p.sum(-1, keepdims=True)
        row["samples"] = [rng.choice(VOCABULARY, 40_000, p=q).tolist() for q in p]
    exact = changed(case, config={"exact_expectation": True})
    for a, b in zip(solve(case)[1], solve(exact)[1], strict=True):
        np.testing.assert_allclose(a, b, atol=5e-3)
