"""What an expert loss, an input hook or a selection rule is where the recipe names only its type."""

import pytest
from pydantic import TypeAdapter

from plait.algorithms.data_selection import DataSelection
from plait.algorithms.expert_losses import ExpertLoss
from plait.algorithms.input_hooks import InputHook

LOSSES = {
    "nll": {"first_tokens": None},
    "dft": {"probability_level": "token"},
    "prob_family": {
        "alpha": 1.0,
        "keep_probability_above": None,
        "keep_probability_below": None,
        "denominator": "kept_tokens",
    },
    "profit": {
        "direction": "higher",
        "threshold": 0.1,
        "threshold_high": None,
        "denominator": "all_tokens",
    },
    "psft": {"clip_high": 0.28, "log_ratio_limit": 20.0},
    "asft": {"base_weight": "probability", "kl_coef": 0.05, "kl_direction": "forward"},
    "eaft": {"top_k": 20, "entropy_normalizer": None, "exponent": 1.0},
    "iw_sft": {
        "level": "sequence",
        "ratio_exponent": 1.0,
        "weight_min": None,
        "weight_max": None,
    },
    "talr": {
        "temperature": "sequence_median",
        "weight_floor": 0.01,
        "normalization": "none",
        "min_temperature": 0.001,
    },
    "phi": {},
    "token_weight": {"denominator": "kept_tokens"},
    "token_cleaning": {"keep_fraction": 0.6, "scope": "minibatch", "denominator": "kept_tokens"},
    "sstoken": {
        "keep_fraction": 0.6,
        "loss_gap_weight": 0.5,
        "warmup_steps": 0,
        "denominator": "kept_tokens",
    },
    "glow": {
        "weight_scale": 1.0,
        "gain_sharpness": 20.0,
        "weight_min": 0.5,
        "weight_max": 5.0,
    },
    "forgetting": {
        "keep_fraction": 0.7,
        "scope": "minibatch",
        "negative_coef_start": 1e-5,
        "negative_coef_end": 0.25,
        "negative_loss": "ascent",
    },
    "dpop": {"preference_scale": 0.3, "chosen_penalty_coef": 50.0},
    "spin": {"preference_scale": 0.1, "margin_loss": "logistic"},
    "aligned_asft": {"odds_coef": 0.1},
    "discriminative_ft": {
        "reference_free": False,
        "score_temperature": None,
        "normalizer_rate": None,
        "normalizer_init": 0.0,
    },
    "redi": {"chosen_coef": 1.0, "rejected_coef": 0.8},
    "topr": {
        "positive_ratio_low": 1.0,
        "positive_ratio_high": 1.0,
        "negative_ratio_low": 0.0,
        "negative_ratio_high": 1.0,
        "reward_baseline": 0.0,
    },
    "rift": {
        "positive_reward": 1.0,
        "negative_reward": -0.2,
        "success_threshold": 1.0,
        "probability_scope": "token",
    },
}
HOOKS = {
    "masked_thought": {
        "mask_rate": 0.4,
        "warmup_fraction": 2 / 3,
        "replacement": "mask_token",
        "hide_from_attention": False,
    },
    "qfft": {"context": "empty_prompt"},
}
RULES = {
    "q_tuning": {
        "bisection_steps": 10,
        "sample_keep_fraction": 0.5,
        "token_keep_fraction": 0.5,
        "neighbor_weight": 0.5,
        "drop_tokens": "highest",
    },
    "uds": {"diversity_weight": 0.0025, "keep_rows": 1, "buffer_size": 1024},
    "lobass": {"keep_fraction": 0.1667},
    "self_response": {"max_candidates": 1, "accept_reward": 1.0},
    "rollout_filter": {"min_mean_reward": 0.0, "max_mean_reward": None},
}
REQUIRED = {
    "forgetting": {"negative_coef_steps": 10},
    "masked_thought": {"total_steps": 10, "mask_token_id": 0},
}
OURS = {"rollout_filter": {"rollouts_per_prompt"}}
"""Fields beyond the formula: what the run does for the rule."""


@pytest.mark.parametrize(
    ("union", "kind", "defaults"),
    [
        *((ExpertLoss, kind, {**fields, "input_hook": None}) for kind, fields in LOSSES.items()),
        *((InputHook, kind, fields) for kind, fields in HOOKS.items()),
        *((DataSelection, kind, fields) for kind, fields in RULES.items()),
    ],
    ids=[*LOSSES, *HOOKS, *RULES],
)
def test_defaults(union, kind, defaults):
    required = REQUIRED.get(kind, {})
    built = TypeAdapter(union).validate_python({"type": kind, **required})
    known = built.model_dump(exclude={"type", *required, *OURS.get(kind, set())})
    assert known == defaults


def test_every_type_is_listed():
    listed = [LOSSES, HOOKS, RULES]
    for union, names in zip((ExpertLoss, InputHook, DataSelection), listed, strict=True):
        schema = TypeAdapter(union).json_schema()
        assert set(schema["discriminator"]["mapping"]) == set(names)
