"""Pairwise expert losses and input hooks: a wrong formula fails its golden case."""

from dataclasses import replace

import numpy as np
import pytest

from golden_cases import EXPERT, case_of, fails
from plait.algorithms import expert_pairs, input_hooks
from plait.algorithms.expert_pairs import DiscriminativeFt, PairLoss, Pairs, PairwiseLoss, Scores
from plait.algorithms.input_hooks import MaskedThought, Qfft
from plait.engine import batch as batching
from plait.launch import golden, golden_pairs
from plait.launch.golden import check_case

PAIRWISE = [
    name
    for name, case in EXPERT.items()
    if case["kind"] == "loss" and any("pair" in row for row in case["rows"])
]


def test_pairwise_cases_were_found():
    assert len(PAIRWISE) == 10


# One field off: (case, field, wrong value).
FIELDS = [
    ("dpop_default", "preference_scale", 0.1),
    ("dpop_small_penalty_micro_batches", "chosen_penalty_coef", 0.0),
    ("dpop_small_penalty_micro_batches", "chosen_penalty_coef", 50.0),
    ("spin_default", "preference_scale", 5.0),
    ("spin_default", "margin_loss", "hinge"),
    ("spin_hinge", "margin_loss", "logistic"),
    ("aligned_asft_default", "odds_coef", 1.0),
    ("aligned_asft_odds_one_two_rejected", "odds_coef", 0.1),
    ("discriminative_ft_with_reference", "normalizer_rate", 1.0),
    ("discriminative_ft_with_reference", "normalizer_rate", 0.95),
    ("discriminative_ft_with_reference", "normalizer_init", 1.0),
    ("discriminative_ft_with_reference", "score_temperature", 0.3),
    ("discriminative_ft_with_reference", "reference_free", True),
    ("discriminative_ft_reference_free", "score_temperature", 1.0),
    ("discriminative_ft__normalizer", "normalizer_rate", 0.9),
    ("redi_default", "rejected_coef", 1.0),
    ("redi_equal_coefs", "chosen_coef", 0.5),
]


@pytest.mark.parametrize(("name", "field", "value"), FIELDS)
def test_wrong_field_fails(name, field, value):
    assert fails(name, expert_loss={field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("mask_rate", 0.3), ("warmup_fraction", 2 / 3), ("total_steps", 50), ("mask_token_id", 98)],
)
@pytest.mark.parametrize("name", ["masked_thought__mask_token", "masked_thought__mask_rate"])
def test_wrong_hook_field_fails(name, field, value):
    found = fails(name, expert_loss={"input_hook": {field: value}})
    assert found == (name == "masked_thought__mask_token" or field != "mask_token_id")


@pytest.mark.parametrize("name", PAIRWISE)
def test_chosen_and_rejected_exchanged_fails(name):
    """With several rejected rows that makes several chosen ones, which is refused."""
    case = case_of(name)
    roles = {"chosen": "rejected", "rejected": "chosen"}
    for row in case["rows"]:
        row["pair"] = roles[row["pair"]]
    assert fails(case) or "chosen rows" in check_case(case).problem


@pytest.mark.parametrize("name", ["dpop_small_penalty_micro_batches", "redi_equal_coefs"])
def test_counts_of_the_micro_batch_fail(monkeypatch, name):
    def local(batch, rows):
        part = batching.select(batch, rows)
        return replace(part, stats={k: v / 2 for k, v in (part.stats or {}).items()})

    monkeypatch.setattr(golden, "select", local)
    assert fails(name)


@pytest.mark.parametrize("name", PAIRWISE)
def test_pairs_across_groups_fail(monkeypatch, name):
    of = Pairs.of

    def everyone(batch):
        return of(replace(batch, group_ids=batch.group_ids * 0))

    monkeypatch.setattr(Pairs, "of", everyone)
    assert fails(name)


@pytest.mark.parametrize(
    "name", ["aligned_asft_default", "redi_default", "discriminative_ft_reference_free"]
)
def test_sums_instead_of_means_fail(monkeypatch, name):
    monkeypatch.setattr(Scores, "means", property(lambda self: self.sums))
    assert fails(name)


@pytest.mark.parametrize(
    "name", ["dpop_default", "spin_default", "discriminative_ft_with_reference"]
)
def test_no_reference_fails(monkeypatch, name):
    monkeypatch.setattr(Scores, "ref_sums", property(lambda self: self.sums.detach() * 0))
    assert fails(name)


@pytest.mark.parametrize("name", ["dpop_default", "spin_default"])
def test_margin_of_the_other_sign_fails(monkeypatch, name):
    softplus = expert_pairs.softplus
    monkeypatch.setattr(expert_pairs, "softplus", lambda x: softplus(-x))
    assert fails(name)


def test_penalty_outside_the_sigmoid_fails(monkeypatch):
    def outside(self, scores):
        chosen, rejected = scores.split(scores.gains)
        margins = chosen - rejected
        penalty = self.chosen_penalty_coef * (-chosen).relu()
        return expert_pairs.softplus(-self.preference_scale * margins) + penalty, margins - penalty

    monkeypatch.setattr(expert_pairs.Dpop, "compare", outside)
    assert fails("dpop_small_penalty_micro_batches")


def test_probability_of_the_rejected_odds_fails(monkeypatch):
    monkeypatch.setattr(expert_pairs, "log_one_minus_exp", lambda x: (1 - x.exp() / 2).log())
    assert fails("aligned_asft_default")


@pytest.mark.parametrize(
    "name", ["discriminative_ft_with_reference", "discriminative_ft__normalizer"]
)
@pytest.mark.parametrize("step", ["old normalizer", "sum over rejected", "live weights"])
def test_wrong_step_of_discriminative_ft_fails(monkeypatch, name, step):
    normalizers, coefs = DiscriminativeFt.normalizers, DiscriminativeFt.rejected_coefs
    if step == "old normalizer":
        monkeypatch.setattr(
            DiscriminativeFt, "normalizers", lambda self, previous, *_: previous.nan_to_num(0.0)
        )
    elif step == "sum over rejected":
        monkeypatch.setattr(DiscriminativeFt, "rejected_coefs", lambda *args: 2 * coefs(*args))
    else:
        monkeypatch.setattr(
            DiscriminativeFt, "ratios", lambda self, r, ref: r if ref is None else r - ref
        )
        monkeypatch.setattr(
            DiscriminativeFt, "normalizers", lambda self, *args: normalizers(self, *args).detach()
        )
    # Gradients are not part of a trace.
    assert fails(name) == (step != "live weights" or name == "discriminative_ft_with_reference")


def test_probability_of_all_rows_fails(monkeypatch):
    prepare = PairwiseLoss.prepare

    def all_rows(self, batch, logprobs, coefs):
        found = prepare(self, batch, logprobs, coefs)
        return expert_pairs.with_stats(found, chosen_tokens=found.denom.expert_tokens)

    monkeypatch.setattr(PairwiseLoss, "prepare", all_rows)
    assert fails("redi_default")


def test_accuracy_of_the_other_sign_fails(monkeypatch):
    call = PairLoss.__call__

    def upside_down(self, tokens):
        result = call(self, tokens)
        accuracy = 1 - result.metrics["expert_pair_accuracy"]
        return replace(result, metrics={**result.metrics, "expert_pair_accuracy": accuracy})

    monkeypatch.setattr(PairLoss, "__call__", upside_down)
    assert fails("dpop_default")


def test_masking_above_the_rate_fails(monkeypatch):
    masked = MaskedThought.masked
    monkeypatch.setattr(MaskedThought, "masked", lambda *args: ~masked(*args))
    assert fails("masked_thought__mask_token")


def test_constant_rate_fails(monkeypatch):
    monkeypatch.setattr(MaskedThought, "coefs", lambda self, step: {"mask_rate": self.mask_rate})
    assert fails("masked_thought__mask_rate")
    assert fails("masked_thought__mask_token")


def test_question_kept_fails(monkeypatch):
    def kept(row, length, context):
        return input_hooks.with_context(row, 0, tuple(row.token_ids[:length].tolist()))

    monkeypatch.setattr(golden_pairs, "with_context", kept)
    assert fails("qfft__empty_prompt")
    assert fails("qfft__no_context")


def test_question_emptied_instead_of_dropped_fails(monkeypatch):
    monkeypatch.setattr(Qfft, "new_context", lambda self, empty: empty)
    assert fails("qfft__no_context")


def test_first_token_without_a_predictor_trained_fails(monkeypatch):
    with_context = input_hooks.with_context

    def trained(row, length, context):
        row = with_context(row, length, context)
        return replace(row, weights=np.ones_like(row.weights))

    monkeypatch.setattr(golden_pairs, "with_context", trained)
    assert fails("qfft__no_context")


def test_two_chosen_rows_in_a_group_fail():
    case = case_of("redi_default")
    case["rows"][1]["pair"] = "chosen"
    assert "2 chosen rows" in check_case(case).problem
