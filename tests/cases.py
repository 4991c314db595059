"""Random golden-format loss cases, for properties that hold whatever the numbers are."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from plait.launch.golden import run_loss

VOCABULARY = 6


def random_case(seed: int, algorithm: str, kinds: str = "ppppee", **config: Any) -> dict[str, Any]:
    """One row a letter of `kinds`, of ragged lengths, with every column that some method reads.

    p policy (two groups, binary rewards), h the same behind a prefix of an expert's, e expert in a group of its own,
    d expert in a policy group, with reward 1.
    """
    rng, more = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    rows = []
    for i, kind in enumerate(kinds):
        n = int(rng.integers(1, 6))
        expert = kind in "de"
        prefix = {"p": 0, "h": max(1, int(more.integers(0, n)))}
        ids = rng.integers(0, VOCABULARY, n).tolist()
        rows.append(
            {
                "source": "expert" if expert else "hybrid" if kind == "h" else "policy",
                "group": f"expert{i}" if kind == "e" else f"group{i % 2}",
                "reward": {"e": None, "d": 1.0}.get(kind, float(i // 2 % 2)),
                "response_ids": ids,
                "prefix_len": prefix.get(kind, n),
                "logits": rng.normal(size=(n, VOCABULARY)).tolist(),
                "old_logprobs": rng.normal(-1.8, 0.5, n).tolist(),
                "rollout_logprobs": rng.normal(-1.8, 0.5, n).tolist(),
                "ref_logprobs": rng.normal(-1.8, 0.5, n).tolist(),
                "signature": str(i // 4),
                "old_entropy": more.uniform(0.1, 1.7, n).tolist(),
                "values": more.normal(size=n).tolist(),
                "samples": [[token, *more.integers(0, VOCABULARY, 2).tolist()] for token in ids],
            }
        )
    return {"algorithm": algorithm, "config": config, "rows": rows, "step": 3}


def changed(case: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(case), **changes}


def relabelled(case: dict[str, Any], source: str) -> dict[str, Any]:
    """The same rows, all written by `source` from their first token on."""
    case = changed(case)
    for row in case["rows"]:
        prefix = len(row["response_ids"]) if source == "expert" else 0
        row |= {"source": source, "prefix_len": prefix}
    return case


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
