"""Traces of data selection are not reproduced by a wrong rule."""

from math import floor
from typing import get_args

import pytest

from golden_cases import CASES, SELECTION, fails
from plait.algorithms import data_selection, selection_rules
from plait.algorithms.data_selection import DataSelection, RolloutFilter, SelfResponse
from plait.launch import golden_selection


def test_every_rule_has_a_case():
    rules = {CASES[name]["config"]["data_selection"]["type"] for name in SELECTION}
    assert rules == set(golden_selection.TRACES)
    union, _ = get_args(DataSelection)
    assert len(get_args(union)) == len(rules)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("q_tuning__batch", "sample_keep_fraction", 0.75),
        ("q_tuning__batch", "token_keep_fraction", 0.7),
        ("q_tuning__batch", "neighbor_weight", 0.0),
        ("q_tuning__batch", "drop_tokens", "lowest"),
        ("uds__fifo_buffer", "diversity_weight", 0.0025),
        ("uds__fifo_buffer", "keep_rows", 2),
        ("lobass__rows", "keep_fraction", 0.1667),
        ("self_response__judge", "max_candidates", 4),
        ("self_response__judge", "accept_reward", 0.0),
        ("rollout_filter__prompts", "min_mean_reward", 0.5),
        ("rollout_filter__prompts", "max_mean_reward", 1.0),
    ],
)
def test_another_setting_fails(name, field, value):
    assert fails(name, data_selection={field: value})


def test_an_interpolated_quantile_fails(monkeypatch):
    import numpy as np

    monkeypatch.setattr(selection_rules, "quantile", lambda v, q: float(np.quantile(v, q)))
    monkeypatch.setattr(selection_rules, "LARGEST_SHARE", 0.2)
    assert fails("q_tuning__batch")


def test_the_other_diagonal_fails(monkeypatch):
    corners = selection_rules.corners
    monkeypatch.setattr(
        selection_rules, "corners", lambda p, e, share: corners(p, [-x for x in e], share)
    )
    assert fails("q_tuning__batch")


def test_rounding_tokens_down_fails(monkeypatch):
    monkeypatch.setattr(selection_rules, "ceil", lambda x: floor(x + 1e-6))
    assert fails("q_tuning__batch")


def test_a_frobenius_norm_fails(monkeypatch):
    monkeypatch.setattr(golden_selection, "nuclear_norm", lambda gram: gram.trace().sqrt())
    assert fails("uds__fifo_buffer")


def test_a_summed_distance_fails(monkeypatch):
    scores = selection_rules.uds_scores

    def nearest(norms, sketches, buffer, weight):
        return scores(norms, sketches, [*buffer, [0.0, 0.0]], weight)

    monkeypatch.setattr(data_selection, "uds_scores", nearest)
    assert fails("uds__fifo_buffer")


def test_an_unrelated_buffer_fails(monkeypatch):
    rank = data_selection.Uds.rank
    monkeypatch.setattr(
        data_selection.Uds,
        "rank",
        lambda self, norms, sketches, memory: rank(self, norms, sketches, {}),
    )
    assert fails("uds__fifo_buffer")


def test_an_absolute_gain_fails(monkeypatch):
    monkeypatch.setattr(
        data_selection,
        "lobass_scores",
        lambda base, ref: [b - r for b, r in zip(base, ref, strict=True)],
    )
    assert fails("lobass__rows")


def test_the_best_instead_of_the_first_candidate_fails(monkeypatch):
    def last(self, rewards):
        good = [i for i, r in enumerate(rewards[: self.max_candidates]) if r >= self.accept_reward]
        return good[-1] if good else None

    monkeypatch.setattr(SelfResponse, "accepted", last)
    assert fails("self_response__judge")


def test_an_inclusive_bound_fails(monkeypatch):
    monkeypatch.setattr(
        RolloutFilter, "keeps", lambda self, r: sum(r) / len(r) >= self.min_mean_reward
    )
    assert fails("rollout_filter__prompts")
