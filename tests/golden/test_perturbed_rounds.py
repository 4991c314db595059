"""Golden cases of ghpo, bread and regft fail when a formula is off."""

import math
from dataclasses import replace

import pytest

from golden_cases import fails
from plait.algorithms import bread, ghpo, losses, regft, sft
from plait.algorithms.base import AlgorithmBase


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ghpo/loss/default", {"normalizer": "rows"}),
        ("ghpo/loss/default", {"advantage_epsilon": 1e-2}),
        ("ghpo/loss/split", {"clip_high": 0.01}),
        ("ghpo/trace/stages", {"hint_fractions": [0.25, 0.75]}),
        ("ghpo/trace/stages", {"failure_threshold": 1.0}),
        ("ghpo/trace/stages", {"hint_start_step": 1}),
        ("bread/loss/anchored group", {"normalizer": "tokens"}),
        ("bread/loss/split", {"advantage": "group_mean"}),
        ("bread/trace/search", {"max_pieces": 4}),
        ("bread/trace/search", {"failure_threshold": 1.0}),
        ("regft/loss/default", {"normalizer": "rows"}),
        ("regft/loss/split", {"expert_loss": {"type": "dft"}}),
        ("regft/trace/selection", {"max_kept_per_problem": 3}),
        ("regft/trace/selection", {"pass_rate_threshold": 0.3}),
        ("regft/trace/selection", {"success_threshold": 0.0}),
    ],
)
def test_other_values_fail(name, config):
    assert fails(name, **config)


def test_hints_that_are_rounded_down_fail(monkeypatch):
    monkeypatch.setattr(ghpo, "hint_length", lambda fraction, n: int(fraction * n))
    assert fails("ghpo/trace/stages")


def test_forced_tokens_in_the_loss_fail(monkeypatch):
    monkeypatch.setattr(bread.Bread, "credit", AlgorithmBase.credit)
    right = losses.policy_component
    everything = losses.Members.all
    monkeypatch.setattr(
        "plait.algorithms.grpo.policy_component",
        lambda out, batch, config: right(out, batch, config, everything(batch)),
    )
    assert fails("bread/loss/anchored group")
    assert fails("bread/loss/split")


def test_a_search_that_goes_left_on_failure_fails(monkeypatch):
    right = bread.search_anchor
    monkeypatch.setattr(
        bread, "search_anchor", lambda rates, n: right([1 - rate for rate in rates], n)
    )
    assert fails("bread/trace/search")


def test_an_anchor_one_piece_short_fails(monkeypatch):
    right = bread.search_anchor

    def short(rates, n):
        search = right(rates, n)
        return search if search.pieces is None else replace(search, pieces=search.pieces - 1)

    monkeypatch.setattr(bread, "search_anchor", short)
    assert fails("bread/trace/search")


def test_shown_lengths_that_are_rounded_up_fail(monkeypatch):
    monkeypatch.setattr(regft, "floor", math.ceil)
    assert fails("regft/trace/selection")


def test_regft_with_an_inclusive_threshold_fails(monkeypatch):
    monkeypatch.setattr(regft, "is_hard", lambda rate, config: rate <= config.pass_rate_threshold)
    assert fails("regft/trace/selection")


def test_regft_with_an_ungated_denominator_fails(monkeypatch):
    right = losses.Members.expert
    monkeypatch.setattr(
        sft.Members, "expert", lambda batch: replace(right(batch), tokens=right(batch).rows)
    )
    assert fails("regft/loss/default")
