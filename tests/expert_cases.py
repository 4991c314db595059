"""Every type of expert loss in its variants, and golden-format rows with every column that some type reads."""

from __future__ import annotations

from typing import Any

import numpy as np

from cases import VOCABULARY, random_case

STEPS = {"negative_coef_steps": 10}
VARIANTS: dict[str, dict[str, Any]] = {
    "nll": {"type": "nll"},
    "nll first": {"type": "nll", "first_tokens": 2},
    "dft": {"type": "dft"},
    "dft sequence": {"type": "dft", "probability_level": "sequence"},
    "phi": {"type": "phi"},
    "prob_family": {"type": "prob_family", "alpha": 2.0},
    "prob_family kept": {"type": "prob_family", "keep_probability_above": 0.1},
    "prob_family all": {
        "type": "prob_family",
        "keep_probability_below": 0.2,
        "denominator": "all_tokens",
    },
    "profit": {"type": "profit"},
    "profit kept": {"type": "profit", "direction": "lower", "denominator": "kept_tokens"},
    "psft": {"type": "psft"},
    "asft": {"type": "asft"},
    "asft reverse": {"type": "asft", "kl_direction": "reverse"},
    "eaft": {"type": "eaft", "top_k": 3},
    "iw_sft": {"type": "iw_sft"},
    "iw_sft token": {"type": "iw_sft", "level": "token"},
    "talr": {"type": "talr"},
    "talr median": {"type": "talr", "temperature": "token_median"},
    "talr mean": {"type": "talr", "temperature": "token_mean"},
    "talr simplex": {"type": "talr", "normalization": "simplex"},
    "token_weight": {"type": "token_weight"},
    "token_weight all": {"type": "token_weight", "denominator": "all_tokens"},
    "token_weight sum": {"type": "token_weight", "denominator": "weight_sum"},
    "token_cleaning": {"type": "token_cleaning"},
    "token_cleaning row": {"type": "token_cleaning", "scope": "row"},
    "sstoken": {"type": "sstoken"},
    "sstoken all": {"type": "sstoken", "denominator": "all_tokens"},
    "glow": {"type": "glow"},
    "forgetting": {"type": "forgetting", **STEPS},
    "forgetting row": {
        "type": "forgetting",
        "scope": "row",
        "negative_loss": "unlikelihood",
        **STEPS,
    },
    "topr": {"type": "topr"},
    "rift": {"type": "rift"},
    "rift mean": {"type": "rift", "probability_scope": "row_mean"},
    "rift sum": {"type": "rift", "probability_scope": "row_sum"},
}
TOKENS_ONLY = {"talr simplex", "token_weight sum", "forgetting", "forgetting row"}


def case_of(seed: int, loss: dict[str, Any], weights: str = "mixed", **config: Any):
    """Expert rows with every column that some type reads."""
    case = random_case(seed, "sft", kinds="eeeeep", **{"expert_loss": loss, **config})
    rng = np.random.default_rng(seed + 100)
    for i, row in enumerate(case["rows"]):
        n = len(row["response_ids"])
        drawn = {"ones": np.ones(n), "binary": rng.integers(0, 2, n).astype(float)}
        drawn["mixed"] = rng.choice([0.0, 0.5, 1.0, 2.0], n)
        row |= {
            "reward": float(i % 2),
            "token_weights": drawn[weights].tolist(),
            "base_logprobs": rng.normal(-1.8, 0.5, n).tolist(),
            "history_logprobs": rng.normal(-1.8, 0.5, n).tolist(),
            "prompt_attention": rng.uniform(size=n).tolist(),
            "ref_logits": rng.normal(size=(n, VOCABULARY)).tolist(),
            "previous_loss": None if i == 1 else float(rng.normal(1.8, 0.1)),
        }
    return case
