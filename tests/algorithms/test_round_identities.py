"""Relations of ghpo, bread and regft; numbers refer to the list in docs/algorithms/index.md."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cases import assert_same, changed, random_case, solve

REGULARIZED = {"entropy_coef": 0.02, "entropy_scope": "all", "kl_coef": 0.05}
CONFIGS: dict[str, dict[str, Any]] = {"ghpo": REGULARIZED, "bread": REGULARIZED}
SEEDS = range(4)


def rounds_case(seed: int, algorithm: str, kinds: str = "pppppp", **config: Any) -> dict[str, Any]:
    """A random case; bread's rows of the first group start with a forced token."""
    case = random_case(seed, algorithm, kinds, **config)
    if algorithm == "bread":
        for row in case["rows"][::2]:
            row |= {"source": "hybrid", "prefix_len": 1}
    return case


@pytest.mark.parametrize("seed", SEEDS)
def test_21_ghpo_is_grpo_with_another_epsilon(seed):
    case = random_case(seed, "ghpo", "pppppp", kl_coef=0.05)
    config = {"normalizer": "tokens", "advantage_epsilon": 1e-4, "kl_coef": 0.05}
    assert_same(case, changed(case, algorithm="grpo", config=config))


@pytest.mark.parametrize("seed", SEEDS)
def test_21_bread_without_anchors_is_grpo(seed):
    case = random_case(seed, "bread", "pppppp", **REGULARIZED)
    assert_same(case, changed(case, algorithm="grpo"))


@pytest.mark.parametrize("seed", SEEDS)
def test_bread_gives_forced_tokens_no_gradient_and_no_place_in_a_denominator(seed):
    case = rounds_case(seed, "bread", **REGULARIZED)
    _, grads = solve(case)
    for row, grad in zip(case["rows"], grads, strict=True):
        assert (grad[: row["prefix_len"]] == 0).all()
    cut = changed(case, algorithm="grpo")
    for row in cut["rows"]:
        row["token_weights"] = [float(t >= row["prefix_len"]) for t in range(len(row["logits"]))]
        row |= {"source": "policy", "prefix_len": 0}
    assert_same(case, cut)


def test_regft_is_sft():
    case = random_case(3, "regft", "eeee", entropy_coef=0.02)
    assert_same(case, changed(case, algorithm="sft"))


@pytest.mark.parametrize("algorithm", CONFIGS)
def test_35_equal_rewards_without_other_terms_train_nothing(algorithm):
    case = rounds_case(0, algorithm)
    for row in case["rows"]:
        row["reward"] = 1.0
    loss, grads = solve(case)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize(("algorithm", "config"), CONFIGS.items())
def test_36_permuting_rows_permutes_gradients(algorithm, config):
    case = rounds_case(1, algorithm, **config)
    loss, grads = solve(case)
    order = [3, 5, 0, 4, 2, 1]
    moved_loss, moved_grads = solve(changed(case, rows=[case["rows"][i] for i in order]))
    assert moved_loss == pytest.approx(loss, abs=1e-12)
    for i, grad in zip(order, moved_grads, strict=True):
        np.testing.assert_allclose(grads[i], grad, atol=1e-12)


@pytest.mark.parametrize(("algorithm", "config"), CONFIGS.items())
def test_37_a_batch_without_trained_tokens_is_zero(algorithm, config):
    case = rounds_case(3, algorithm, **config)
    for row in case["rows"]:
        row["token_weights"] = [0.0] * len(row["response_ids"])
    loss, grads = solve(case)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("normalizer", ["tokens", "rows", "constant"])
@pytest.mark.parametrize(("algorithm", "config"), CONFIGS.items())
def test_any_split_into_micro_batches_is_the_same(algorithm, config, normalizer):
    case = rounds_case(5, algorithm, **config, normalizer=normalizer, max_response_length=7)
    for split in ([[0], [1], [2], [3], [4], [5]], [[4, 5], [0, 1, 2, 3]], [[5, 0, 3], [1, 4, 2]]):
        assert_same(case, changed(case, micro_batches=split))
