"""Pairwise expert losses: how they relate to each other and to nll, and what they must not depend on."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from cases import VOCABULARY, assert_same, changed, solve
from plait.algorithms.expert_pairs import softplus
from plait.algorithms.expert_selection import log_one_minus_exp
from plait.launch.golden import run_loss

TYPES: dict[str, dict[str, Any]] = {
    "dpop": {"chosen_penalty_coef": 3.0},
    "spin": {},
    "aligned_asft": {},
    "discriminative_ft": {},
    "redi": {},
}


def pairs(loss: dict[str, Any], groups: str = "crr cr rc c r", seed: int = 0) -> dict[str, Any]:
    """One group a word: c a chosen row, r a rejected one; the last two groups are incomplete."""
    rng = np.random.default_rng(seed)
    rows = []
    for name, group in enumerate(groups.split()):
        for role in group:
            n = int(rng.integers(1, 5))
            rows.append(
                {
                    "source": "expert",
                    "group": f"q{name}",
                    "pair": {"c": "chosen", "r": "rejected"}[role],
                    "reward": None,
                    "response_ids": rng.integers(0, VOCABULARY, n).tolist(),
                    "prefix_len": n,
                    "logits": rng.normal(size=(n, VOCABULARY)).tolist(),
                    "ref_logprobs": rng.normal(-1.8, 0.5, n).tolist(),
                    "log_normalizer": float(rng.normal()) if role == "c" else None,
                }
            )
    return {"algorithm": "sft", "config": {"expert_loss": loss}, "rows": rows, "step": 3}


def case_of(name: str, **fields: Any) -> dict[str, Any]:
    return pairs({"type": name, **TYPES.get(name, {}), **fields})


def test_spin_is_dpop_without_penalty():
    spin = case_of("spin", preference_scale=0.3)
    assert_same(spin, case_of("dpop", chosen_penalty_coef=0.0))


def test_redi_without_rejected_term_is_row_normalized_nll():
    redi = pairs({"type": "redi", "rejected_coef": 0.0}, "cr cr rc")
    nll = changed(redi, config={"expert_loss": {"type": "nll"}, "normalizer": "rows"})
    nll["rows"] = [row for row in nll["rows"] if row["pair"] == "chosen"]
    loss, grads = solve(redi)
    expected, expected_grads = solve(nll)
    assert loss == pytest.approx(expected, abs=1e-12)
    chosen = [i for i, row in enumerate(redi["rows"]) if row["pair"] == "chosen"]
    for i, want in zip(chosen, expected_grads, strict=True):
        np.testing.assert_allclose(grads[i], want, atol=1e-12)
    for i in set(range(len(grads))) - set(chosen):
        assert not grads[i].any()


def test_aligned_asft_is_a_sum_of_log_odds():
    """-a_c - odds_coef (log sigmoid(o_c) + log sigmoid(-o_r)), o the log-odds of exp(a)."""
    case = pairs({"type": "aligned_asft", "odds_coef": 0.4}, "crr cr rc")
    means: dict[str, list[float]] = {}
    for row in case["rows"]:
        logprobs = torch.tensor(row["logits"], dtype=torch.float64).log_softmax(-1)
        picked = logprobs.gather(1, torch.tensor(row["response_ids"])[:, None])
        means.setdefault(f"{row['group']}{row['pair']}", []).append(picked.mean().item())
    losses = []
    for group in {row["group"] for row in case["rows"]}:
        (chosen,) = means[f"{group}chosen"]
        for rejected in means[f"{group}rejected"]:
            odds = [a - np.log1p(-np.exp(a)) for a in (chosen, rejected)]
            sigmoids = -np.logaddexp(0, -odds[0]) - np.logaddexp(0, odds[1])
            losses.append(-chosen - 0.4 * sigmoids)
    assert solve(case)[0] == pytest.approx(np.mean(losses), abs=1e-12)


@pytest.mark.parametrize("name", TYPES)
def test_incomplete_groups_do_not_matter(name):
    everything, complete = case_of(name), case_of(name)
    complete["rows"] = complete["rows"][:7]
    loss, grads = solve(everything)
    expected, expected_grads = solve(complete)
    assert loss == pytest.approx(expected, abs=1e-12)
    for got, want in zip(grads[:7], expected_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)
    assert not any(grad.any() for grad in grads[7:])


@pytest.mark.parametrize("name", TYPES)
def test_no_complete_group_is_exactly_zero(name):
    case = case_of(name)
    case["rows"] = case["rows"][7:]
    result = run_loss(case)
    assert result["loss"] == 0.0
    assert not any(np.asarray(grad).any() for grad in result["grad_logits"])
    assert result["metrics"] == {"expert_loss": 0.0}


@pytest.mark.parametrize("normalizer", ["rows", "constant"])
@pytest.mark.parametrize("name", TYPES)
def test_the_hosts_normalizer_plays_no_part(name, normalizer):
    case = case_of(name)
    other = changed(case, config={**case["config"], "normalizer": normalizer})
    assert_same(case, other)


@pytest.mark.parametrize("name", TYPES)
def test_groups_in_micro_batches_change_nothing(name):
    case = case_of(name)
    whole = run_loss(case)
    for plan in ([[0, 1, 2], [3, 4], [5, 6], [7], [8]], [[7, 5, 6], [8, 3, 4, 0, 1, 2]]):
        parts = run_loss(changed(case, micro_batches=plan))
        assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-12)
        for got, want in zip(parts["grad_logits"], whole["grad_logits"], strict=True):
            np.testing.assert_allclose(got, want, atol=1e-12)
        for key, value in whole["metrics"].items():
            assert parts["metrics"][key] == pytest.approx(value, abs=1e-12), key


@pytest.mark.parametrize("name", TYPES)
def test_weights_only_decide_membership(name):
    case = case_of(name)
    longest = max(range(7), key=lambda i: len(case["rows"][i]["response_ids"]))
    for row in case["rows"]:
        row["token_weights"] = [1.0] * len(row["response_ids"])
    case["rows"][longest]["token_weights"][0] = 0.0
    scaled = copy.deepcopy(case)
    for row in scaled["rows"]:
        row["token_weights"] = [7.0 * w for w in row["token_weights"]]
    assert_same(case, scaled)
    other = copy.deepcopy(case)
    other["rows"][longest]["logits"][0] = [9.0, -9.0, 3.0, 0.0, 1.0, 2.0]
    assert_same(case, other)
    assert not solve(case)[1][longest][0].any()


def test_first_step_of_spin_pushes_the_pair_apart():
    """At ref = current the margin is exactly 0, where the loss is ln 2 and its slope half the scale."""
    case = pairs({"type": "spin", "preference_scale": 1.0}, "cr")
    for row in case["rows"]:
        logprobs = torch.tensor(row["logits"], dtype=torch.float64).log_softmax(-1)
        row["ref_logprobs"] = (
            logprobs.gather(1, torch.tensor(row["response_ids"])[:, None]).squeeze(1).tolist()
        )
    loss, grads = solve(case)
    assert loss == pytest.approx(np.log(2), abs=1e-12)
    picked = case["rows"][0]["response_ids"][0]
    first = torch.tensor(case["rows"][0]["logits"][0], dtype=torch.float64)
    p = first.softmax(-1)[picked].item()
    assert grads[0][0][picked] == pytest.approx(-0.5 * (1 - p), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_tails_are_finite_and_exact(dtype):
    x = torch.tensor([-800.0, -20.0, 0.0, 20.0, 800.0], dtype=dtype, requires_grad=True)
    y = softplus(x)
    y.sum().backward()
    want = np.logaddexp(0.0, x.detach().double().numpy())
    np.testing.assert_allclose(y.detach().double().numpy(), want, rtol=1e-6)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, x.detach().sigmoid())
    near = torch.tensor([-1e-6, -1e-3, -0.7, -0.69, -40.0, -800.0], dtype=dtype, requires_grad=True)
    values = log_one_minus_exp(near)
    values.sum().backward()
    assert near.grad is not None
    assert bool(values.isfinite().all())
    assert bool(near.grad.isfinite().all())
    exact = torch.log(-torch.expm1(near.detach().double()))
    torch.testing.assert_close(values.detach().double(), exact, atol=1e-6, rtol=1e-6)
