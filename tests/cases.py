"""Random golden-format loss cases, for properties that hold whatever the numbers are."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from plait.launch.golden import run_loss

VOCABULARY = 6


def random_case(seed: int, algorithm: str, kinds: str = "ppppee", **config: Any) -> dict[str, Any]:
    """One row a letter of `kinds`: p policy (two groups, binary rewards), e expert; ragged lengths."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, kind in enumerate(kinds):
        n = int(rng.integers(1, 6))
        expert = kind == "e"
        rows.append(
            {
                "source": "expert" if expert else "policy",
                "group": f"expert{i}" if expert else f"group{i % 2}",
                "reward": None if expert else float(i // 2 % 2),
                "response_ids": rng.integers(0, VOCABULARY, n).tolist(),
                "prefix_len": n if expert else 0,
                "logits": rng.normal(size=(n, VOCABULARY)).tolist(),
                "old_logprobs": rng.normal(-1.8, 0.5, n).tolist(),
                "rollout_logprobs": rng.normal(-1.8, 0.5, n).tolist(),
                "ref_logprobs": rng.normal(-1.8, 0.5, n).tolist(),
                "signature": str(i // 4),
            }
        )
    return {"algorithm": algorithm, "config": config, "rows": rows, "step": 3}


def changed(case: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(case), **changes}


def on_policy(case: dict[str, Any]) -> dict[str, Any]:
    """The same case at the first update: old log-probs are the current ones."""
    case = copy.deepcopy(case)
    for row in case["rows"]:
        logits = np.asarray(row["logits"])
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        row["old_logprobs"] = [float(logprobs[t, v]) for t, v in enumerate(row["response_ids"])]
    return case


def solve(case: dict[str, Any]) -> tuple[float, list[np.ndarray]]:
    """Loss and gradient, one array [t, V] a row."""
    result = run_loss(case)
    return result["loss"], [np.asarray(grad) for grad in result["grad_logits"]]


def assert_same(one: dict[str, Any], other: dict[str, Any], *, loss: bool = True) -> None:
    """Equal loss and gradient to 1e-9 (gradient only where `loss` is False)."""
    loss_one, grads_one = solve(one)
    loss_other, grads_other = solve(other)
    if loss:
        assert abs(loss_one - loss_other) < 1e-9
    for a, b in zip(grads_one, grads_other, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9, rtol=0)
