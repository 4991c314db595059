"""Columns, ties and memories of expert-loss cases: what a row lacks is named, what is not read is not needed."""

import pytest

from golden_cases import case_of
from plait.launch.golden import check_case


def trace(config, inputs, outputs):
    return check_case(
        {
            "name": "trace",
            "kind": "trace",
            "algorithm": "sft",
            "config": config,
            "inputs": inputs,
            "expect": {"outputs": outputs},
        }
    )


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("psft_default", "old_logprobs"),
        ("asft_default", "ref_logits"),
        ("iw_sft_sequence", "ref_logprobs"),
        ("token_weight_critical_tokens", "token_weights"),
        ("token_cleaning_row_scope", "base_logprobs"),
        ("token_cleaning_row_scope", "ref_logprobs"),
        ("forgetting_scheduled", "base_logprobs"),
        ("sstoken_default", "history_logprobs"),
        ("sstoken_default", "prompt_attention"),
        ("sstoken_gap_only", "history_logprobs"),
        ("dpop_default", "pair"),
        ("forgetting_scheduled", "ref_logprobs"),
        ("dpop_default", "ref_logprobs"),
        ("redi_default", "pair"),
        ("discriminative_ft_with_reference", "ref_logprobs"),
        ("topr_baseline", "old_logprobs"),
        ("topr_baseline", "reward"),
        ("rift_default", "reward"),
    ],
)
@pytest.mark.parametrize("everywhere", [True, False])
def test_missing_column_is_named(name, column, everywhere):
    case = case_of(name)
    experts = [i for i, row in enumerate(case["rows"]) if row["source"] == "expert"]
    missing = experts if everywhere else experts[-1:]
    for i in missing:
        case["rows"][i].pop(column, None)
    assert f"row {missing[0]} has no {column}" in check_case(case).problem


@pytest.mark.parametrize(
    ("loss", "column"),
    [
        ({"type": "asft"}, "ref_logits"),
        ({"type": "token_weight"}, "token_weights"),
        ({"type": "iw_sft"}, "ref_logprobs"),
        ({"type": "sstoken"}, "history_logprobs"),
    ],
)
def test_missing_column_of_a_prefix_is_named(loss, column):
    case = case_of("uft__dft")
    case["config"]["expert_loss"] = loss
    assert f"row 0 has no {column}" in check_case(case).problem


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("asft_default", "ref_logits"),
        ("psft_default", "old_logprobs"),
        ("token_cleaning_minibatch_scope", "base_logprobs"),
        ("topr_baseline", "reward"),
    ],
)
def test_row_without_supervised_tokens_needs_no_column(name, column):
    case = case_of(name)
    masked = {**case["rows"][0], "group": "masked"}
    masked["token_weights"] = [0.0] * len(masked["response_ids"])
    masked.pop(column)
    case["rows"].append(masked)
    case["expect"]["grad_logits"].append([[0.0] * len(v) for v in masked["logits"]])
    case.pop("micro_batches", None)
    result = check_case(case)
    assert result.ok, result.problem


def test_rows_of_one_prompt_have_their_own_previous_loss():
    case = case_of("glow_default")
    for row in case["rows"]:
        row.pop("sample_id")
        row["group"] = "a"
    result = check_case(case)
    assert result.ok, result.problem


def test_hybrid_row_without_prefix_length_fails():
    case = case_of("uft__dft")
    case["rows"][0].pop("prefix_len")
    assert "prefix_len" in check_case(case).problem


def test_reference_free_normalizer_ignores_reference_scores():
    config = {"expert_loss": {"type": "discriminative_ft", "reference_free": True}}
    entry = {"group": "q", "rejected_scores": [-1.0, -0.5]}
    produced = [
        trace(config, [given], [{"log_normalizer": 0.0}]).problem
        for given in (entry, {**entry, "rejected_ref_scores": [-3.0, 2.0]})
    ]
    assert produced[0] == produced[1]
    assert "log_normalizer" in produced[0]


def test_random_tokens_replace_whatever_the_mask_token_is():
    hook = {"type": "masked_thought", "replacement": "random_token", "total_steps": 10}
    entry = {"response_ids": [4, 5], "uniform_draws": [0.1, 0.9], "random_token_ids": [7, 8]}
    outputs = [{"mask_rate": 0.4, "input_ids": [7, 5]}, {"mask_rate": 0.0, "input_ids": [4, 5]}]
    for known in ({}, {"mask_token_id": 99}):
        config = {"expert_loss": {"type": "nll", "input_hook": {**hook, **known}}}
        result = trace(config, [{**entry, "step": 10}, entry], outputs)
        assert result.ok, result.problem


@pytest.mark.parametrize(("drop", "kept"), [("highest", [0, 1]), ("lowest", [1, 0])])
def test_of_equal_token_scores_the_earlier_ranks_higher(drop, kept):
    config = {"data_selection": {"type": "q_tuning", "drop_tokens": drop}}
    entry = {"perplexity": [2.0], "entropy": [1.0], "token_nll": [[0.5, 1.5]]}
    result = trace(config, [entry], [{"token_keep": [kept]}])
    assert result.ok, result.problem
