"""Relations that hold for every method and any rows (numbers refer to the list in docs/algorithms/index.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cases import assert_same, changed, random_case, solve
from plait.algorithms import ALGORITHMS, Setup
from plait.engine.types import Sampling
from plait.launch.golden import run_loss

TERMS = {"entropy_coef": 0.02, "kl_coef": 0.05}
SCOPED = {**TERMS, "entropy_scope": "all"}
CAPPED = {**TERMS, "sampler_ratio_cap": 1.5}
CLIPPED = {**CAPPED, "dual_clip": 3.0}
# Method, and its loss where that is not `main`: rows (letters of `random_case`), config.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "amft": ("ppppee", CLIPPED),
    "amft validation": ("pppppp", {}),
    "bread": ("hphphp", SCOPED),
    "chord": ("ppppee", {**CLIPPED, "expert_loss": {"type": "phi"}}),
    "ghpo": ("pppppp", SCOPED),
    "grpo": ("ppppee", CLIPPED),
    "hpt": ("ppppee", {**SCOPED, "expert_coef": 0.3}),
    "luffy": ("ppppdd", {**SCOPED, **CAPPED, "clip_low": 0.2, "clip_high": 0.2}),
    "one_token_rollout": ("eeee", {}),
    "polychromic": ("ppppppee", {**SCOPED, "set_size": 2}),
    "ppo": ("pppphh", CLIPPED),
    "prefix_rft": ("pppphh", {**TERMS, "entropy_keep_fraction": 0.5}),
    "regft": ("eeee", {"entropy_coef": 0.02}),
    "relift": ("pppppp", TERMS),
    "relift sft": ("eeee", {"expert_entropy_coef": 0.02}),
    "rift": ("ppppee", {"entropy_coef": 0.02}),
    "sasr": ("pppppp", TERMS),
    "sasr sft": ("eeee", {}),
    "sft": ("ppppee", {"entropy_coef": 0.02}),
    "srft": ("ppppdd", {**SCOPED, **CAPPED, "demo_shaping_gamma": 0.1}),
    "super_rl": ("ppppee", SCOPED),
    "topr": ("ppppee", {**SCOPED, "reward_baseline": 0.5}),
    "uft": ("pppphh", {**TERMS, "expert_coef": 0.3}),
    "visurf": ("ppppdd", SCOPED),
}
EXCLUDED = {
    "ppo critic": "a loss of values, not of logits: test_ppo.py",
    "stages": "its losses are those of its members",
}
# Methods without a signal where all rewards are equal, with rows that have no other loss.
SILENT = {
    "bread": "hphphp",
    "luffy": "ppppdd",
    "prefix_rft": "pppphh",
    "visurf": "ppppdd",
    **dict.fromkeys(
        ("amft", "chord", "ghpo", "grpo", "hpt", "relift", "sasr", "super_rl", "uft"), "pppp"
    ),
}


def case_of(name: str, seed: int, kinds: str | None = None, **config: Any) -> dict[str, Any]:
    algorithm, _, update = name.partition(" ")
    rows, terms = METHODS[name]
    case = random_case(seed, algorithm, kinds or rows, **{**terms, **config})
    return {**case, "update": update or "main"}


def test_every_loss_of_every_method_is_here():
    losses = {"stages"}
    for name, cls in ALGORITHMS.items():
        if name not in EXCLUDED:
            found = cls(cls.Config.model_validate({"type": name}), Setup(Sampling(8))).losses
            losses |= {f"{name} {loss}".removesuffix(" main") for loss in found}
    assert losses == METHODS.keys() | EXCLUDED.keys()


@pytest.mark.parametrize("name", SILENT)
def test_35_equal_rewards_without_other_terms_train_nothing(name):
    case = case_of(name, 0, SILENT[name], entropy_coef=0.0, kl_coef=0.0)
    for row in case["rows"]:
        row["reward"] = 1.0
    loss, grads = solve(case)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("name", METHODS)
def test_36_permuting_rows_permutes_gradients(name):
    case = case_of(name, 1)
    loss, grads = solve(case)
    order = np.random.default_rng(1).permutation(len(case["rows"]))
    moved_loss, moved = solve(changed(case, rows=[case["rows"][i] for i in order]))
    assert moved_loss == pytest.approx(loss, abs=1e-12)
    for i, grad in zip(order, moved, strict=True):
        np.testing.assert_allclose(grads[i], grad, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_36_a_row_of_weight_zero_changes_nothing(name):
    case = case_of(name, 2)
    kinds, _ = METHODS[name]
    muted = case_of(name, 9, kinds[0] + kinds[-1])["rows"]
    for i, row in enumerate(muted):
        row |= {"group": f"muted{i}", "token_weights": [0.0] * len(row["response_ids"])}
    loss, grads = solve(case)
    more_loss, more_grads = solve(changed(case, rows=case["rows"] + muted))
    assert more_loss == pytest.approx(loss, abs=1e-12)
    for a, b in zip(grads, more_grads, strict=False):
        np.testing.assert_allclose(a, b, atol=1e-12)
    assert all((grad == 0).all() for grad in more_grads[-2:])


@pytest.mark.parametrize("name", METHODS)
def test_37_a_batch_without_trained_tokens_is_zero(name):
    case = case_of(name, 3)
    for row in case["rows"]:
        row["token_weights"] = [0.0] * len(row["response_ids"])
    loss, grads = solve(case)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("name", METHODS)
def test_38_gradients_sum_to_zero_over_the_vocabulary(name):
    _, grads = solve(case_of(name, 4))
    assert any((grad != 0).any() for grad in grads)
    for grad in grads:
        np.testing.assert_allclose(grad.sum(-1), 0, atol=1e-12)


@pytest.mark.parametrize("normalizer", ["tokens", "rows", "constant"])
@pytest.mark.parametrize("name", METHODS)
def test_any_split_into_micro_batches_is_the_same(name, normalizer):
    fields = ALGORITHMS[name.partition(" ")[0]].Config.model_fields
    chosen = {field: normalizer for field in ("normalizer", "expert_normalizer") if field in fields}
    case = case_of(name, 5, **chosen, max_response_length=7)
    whole = run_loss(case)["metrics"]
    n = len(case["rows"])
    order = np.random.default_rng(5).permutation(n).tolist()
    splits = [
        [[i] for i in range(n)],
        [[i, i + 1] for i in range(0, n, 2)],
        [[n - 2, n - 1], [*range(n - 2)]],  # experts or prefixes apart from policy rows
        [order[: n // 2], order[n // 2 :]],
    ]
    for split in splits:
        parts = changed(case, micro_batches=split)
        assert_same(case, parts)
        assert run_loss(parts)["metrics"] == pytest.approx(whole, abs=1e-12)
