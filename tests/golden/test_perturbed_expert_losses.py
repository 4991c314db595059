"""Proof that a wrong formula of an expert loss misses the reference numbers."""

import pytest
import torch

from golden_cases import EXPERT, fails
from plait.algorithms import (
    expert_base,
    expert_losses,
    expert_pairs,
    expert_rows,
    expert_selection,
    reward_signed,
)
from plait.algorithms.expert_base import ExpertLossBase, Supervised, TokenLoss
from plait.algorithms.expert_rows import Glow
from plait.algorithms.sft import Sft
from plait.launch import golden_expert

TYPES = {
    cls.model_fields["type"].default: cls
    for module in (expert_losses, expert_pairs, expert_rows, expert_selection)
    for cls in vars(module).values()
    if isinstance(cls, type) and issubclass(cls, ExpertLossBase) and "type" in cls.model_fields
}


def test_every_type_has_a_case():
    losses = [case["config"].get("expert_loss") for case in EXPERT.values()]
    assert {loss["type"] for loss in losses if loss} == set(TYPES)


# One field off: (case, field, wrong value).
FIELDS = [
    ("nll_first_tokens", "first_tokens", 3),
    ("dft_sequence_probability", "probability_level", "token"),
    ("prob_family_alpha_half", "alpha", 1.0),
    ("prob_family_p_above_threshold", "keep_probability_above", 0.5),
    ("prob_family_p_above_threshold", "denominator", "all_tokens"),
    ("prob_family_logp_below_threshold_all_tokens", "denominator", "kept_tokens"),
    ("prob_family_logp_below_threshold_all_tokens", "alpha", 1.0),
    ("profit_default", "denominator", "kept_tokens"),
    ("profit_default", "direction", "lower"),
    ("profit_middle_kept_tokens", "threshold_high", 1.0),
    ("psft_default", "clip_high", 0.2),
    ("asft_default", "kl_coef", 0.1),
    ("asft_default", "kl_direction", "reverse"),
    ("asft_reverse_kl", "kl_direction", "forward"),
    ("asft_sft_plus_kl", "base_weight", "probability"),
    ("eaft_paper_normalizer", "entropy_normalizer", 3.0),
    ("eaft_paper_normalizer", "top_k", 3),
    ("eaft_code_normalizer_small_vocabulary", "exponent", 2.0),
    ("iw_sft_sequence", "ratio_exponent", 2.0),
    ("iw_sft_sequence", "level", "token"),
    ("iw_sft_token_clamped", "weight_max", 16.0),
    ("talr_default", "temperature", "token_median"),
    ("talr_default", "weight_floor", 0.5),
    ("talr_token_median_micro_batches", "temperature", "token_mean"),
    ("talr_simplex", "normalization", "none"),
    ("token_weight_critical_tokens_all_tokens", "denominator", "kept_tokens"),
    ("token_weight_real_weights_weight_sum", "denominator", "kept_tokens"),
    ("token_cleaning_minibatch_scope", "scope", "row"),
    ("token_cleaning_row_scope", "keep_fraction", 0.8),
    ("token_cleaning_minibatch_scope", "denominator", "all_tokens"),
    ("sstoken_default", "loss_gap_weight", 0.0),
    ("sstoken_gap_only", "keep_fraction", 0.6),
    ("glow_default", "gain_sharpness", 10.0),
    ("glow_wide_weights", "weight_max", 1.0),
    ("forgetting_scheduled", "negative_loss", "unlikelihood"),
    ("forgetting_scheduled", "negative_coef_start", 0.0),
    ("forgetting_unlikelihood_row_scope", "scope", "minibatch"),
    ("topr_sequence_sums", "negative_ratio_high", 0.1),
    ("topr_baseline", "reward_baseline", 0.0),
    ("rift_default", "negative_reward", -0.1),
    ("rift_row_mean", "probability_scope", "row_sum"),
    ("rift_row_mean", "probability_scope", "token"),
]


@pytest.mark.parametrize(("name", "field", "value"), FIELDS)
def test_wrong_field_fails(name, field, value):
    assert fails(name, expert_loss={field: value})


@pytest.mark.parametrize(
    "name",
    [
        "dft_default",
        "phi_default",
        "eaft_paper_normalizer",
        "iw_sft_sequence",
        "talr_default",
        "glow_default",
    ],
)
def test_weight_with_gradient_fails(monkeypatch, name):
    """Weights computed from log-probs that were not detached; eaft: from the log-probs' own exp."""

    def attached(self, weight):
        live = weight.detach() * (self.logprobs - self.logprobs.detach()).exp()
        metrics = {"expert_weight_mean": self.members.mean(weight.detach())}
        return TokenLoss(-live * self.logprobs, metrics)

    monkeypatch.setattr(Supervised, "weighted", attached)
    assert fails(name)


@pytest.mark.parametrize(
    "name", ["profit_middle_kept_tokens", "talr_token_median_micro_batches", "topr_baseline"]
)
def test_counts_of_the_micro_batch_fail(monkeypatch, name):
    from dataclasses import replace

    from plait.engine import batch as batching
    from plait.launch import golden

    def local(batch, rows):
        part = batching.select(batch, rows)
        stats = {k: v / 2 for k, v in (part.stats or {}).items()}
        return replace(part, denom=batching.count(part), stats=stats)

    monkeypatch.setattr(golden, "select", local)
    assert fails(name)


@pytest.mark.parametrize("name", ["token_cleaning_minibatch_scope", "token_cleaning_row_scope"])
@pytest.mark.parametrize("lowest", [True, False])
def test_wrong_ranking_fails(monkeypatch, name, lowest):
    highest = expert_base.highest

    def wrong(scores, mask, count):
        return highest(-scores, mask, count) if lowest else highest(scores, mask, count + 1)

    monkeypatch.setattr(expert_base, "highest", wrong)
    assert fails(name)


def test_lower_median_fails(monkeypatch):
    monkeypatch.setattr(expert_losses, "median", lambda values: float(values.median()) + 1e-3)
    assert fails("talr_default")


def test_rounding_down_fails(monkeypatch):
    monkeypatch.setattr(expert_selection, "rounded_up", lambda fraction, n: int(fraction * n))
    assert fails("sstoken_default")


def test_entropy_of_the_whole_vocabulary_fails(monkeypatch):
    entropy = golden_expert.topk_entropy
    monkeypatch.setattr(golden_expert, "topk_entropy", lambda logits, k: entropy(logits, 10**6))
    assert fails("eaft_paper_normalizer")


def test_ratio_of_the_mean_fails_topr(monkeypatch):
    def mean(values, batch):
        counts = torch.ones_like(values)
        total = torch.zeros(batch.num_rows, dtype=values.dtype)
        return total.index_add(0, batch.row_ids, values) / total.index_add(
            0, batch.row_ids, counts
        ).clamp(min=1)

    monkeypatch.setattr(reward_signed, "sum_rows", mean)
    assert fails("topr_sequence_sums")


def test_memory_written_before_it_is_read_fails(monkeypatch):
    recall = Glow.recall

    def late(self, batch, logprobs, memory):
        visits = recall(self, batch, logprobs, memory).visits
        return recall(self, batch, logprobs, {**memory, **(visits or {})})

    monkeypatch.setattr(Glow, "recall", late)
    assert fails("glow__memory")
    assert fails("glow_default")


def test_forgotten_memory_fails(monkeypatch):
    monkeypatch.setattr(Sft, "remember", lambda self, batch: None)
    assert fails("glow__memory")
