"""Relations of ghpo, bread and regft; numbers refer to the list in docs/algorithms/index.md."""

from __future__ import annotations

import pytest

from cases import assert_same, changed, random_case, solve

REGULARIZED = {"entropy_coef": 0.02, "entropy_scope": "all", "kl_coef": 0.05}


SEEDS = range(4)


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
    case = random_case(seed, "bread", "hphphp", **REGULARIZED)
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
