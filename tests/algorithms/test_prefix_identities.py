"""Relations of uft, prefix_rft, relift, sasr, one_token_rollout that hold for any rows (docs/algorithms/index.md)."""

import numpy as np
import pytest

from cases import VOCABULARY, assert_same, changed, random_case, solve
from plait.launch.golden import run_loss

SEEDS = range(4)
DR_GRPO = {"advantage": "group_mean", "normalizer": "constant", "max_response_length": 7}
FREE = {"clip_low": None, "clip_high": None}
ENTROPY = {"entropy_coef": 0.001}
NAMES = ["uft", "prefix_rft", "relift", "sasr"]


def hybrid_case(seed, algorithm, **config):
    """Policy rows and two hybrid ones: the first tokens of rows 4 and 5 are an expert's."""
    case = random_case(seed, algorithm, kinds="pppppp", **config)
    rng = np.random.default_rng(seed + 100)
    for i, row in enumerate(case["rows"]):
        row["reward"] = float(rng.integers(0, 2))
        row["old_entropy"] = rng.uniform(0.1, 1.7, len(row["response_ids"])).tolist()
        if i >= 4:
            row |= {
                "source": "hybrid",
                "prefix_len": int(rng.integers(0, len(row["response_ids"]))),
            }
            row["prefix_len"] = max(row["prefix_len"], 1)
    return case


def relabelled(case, source):
    """All rows written by `source` from their first token on."""
    case = changed(case)
    for row in case["rows"]:
        n = len(row["response_ids"]) if source == "expert" else 0
        row |= {"source": source, "prefix_len": n}
    return case


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
    case = hybrid_case(seed, "prefix_rft", **config)
    grpo = {**relabelled(case, "policy"), "algorithm": "grpo"}
    assert_same(case, {**grpo, "config": {"dual_clip": 3.0, **DR_GRPO}})


@pytest.mark.parametrize("seed", SEEDS)
def test_08_prefix_rft_that_keeps_nothing_leaves_the_prefix_alone(seed):
    case = hybrid_case(seed, "prefix_rft", entropy_keep_fraction=0.0, entropy_coef=0.0)
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


@pytest.mark.parametrize("algorithm", NAMES)
def test_35_equal_rewards_without_other_terms_train_nothing(algorithm):
    case = random_case(0, algorithm, kinds="pppp", entropy_coef=0.0, kl_coef=0.0)
    for row in case["rows"]:
        row["reward"] = 1.0
    loss, grads = solve(case)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


def some_cases(seed):
    cases = [hybrid_case(seed, name, kl_coef=0.02) for name in NAMES]
    cases += [changed(random_case(seed, name, kinds="eeee"), update="sft") for name in NAMES[2:]]
    one_token = random_case(seed, "one_token_rollout", kinds="eeee")
    for row in one_token["rows"]:
        row["samples"] = [[0, token, 3] for token in row["response_ids"]]
    return [*cases, one_token]


@pytest.mark.parametrize("case", some_cases(1), ids=lambda case: case["algorithm"])
def test_36_permuting_rows_permutes_gradients(case):
    loss, grads = solve(case)
    order = list(reversed(range(len(case["rows"]))))
    moved_loss, moved = solve(changed(case, rows=[case["rows"][i] for i in order]))
    assert moved_loss == pytest.approx(loss, abs=1e-12)
    for i, grad in zip(order, moved, strict=True):
        np.testing.assert_allclose(grads[i], grad, atol=1e-12)


@pytest.mark.parametrize("case", some_cases(2), ids=lambda case: case["algorithm"])
def test_37_a_batch_without_trained_tokens_is_zero(case):
    for row in case["rows"]:
        row["token_weights"] = [0.0] * len(row["response_ids"])
    loss, grads = solve(case)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("case", some_cases(3), ids=lambda case: case["algorithm"])
def test_38_gradients_sum_to_zero_over_the_vocabulary(case):
    for grad in solve(case)[1]:
        np.testing.assert_allclose(grad.sum(-1), 0, atol=1e-12)


@pytest.mark.parametrize("case", some_cases(4), ids=lambda case: case["algorithm"])
def test_any_split_into_micro_batches_is_the_same(case):
    n = len(case["rows"])
    splits = [[[i] for i in range(n)], [[n - 1, 0], list(range(1, n - 1))]]
    for split in splits:
        assert_same(case, changed(case, micro_batches=split))
        whole, cut = (
            run_loss(case)["metrics"],
            run_loss({**case, "micro_batches": split})["metrics"],
        )
        assert cut == pytest.approx(whole)
