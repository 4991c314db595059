"""Numbers that the data stores for each token of a demonstration, on their way into the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from plait.algorithms import ALGORITHMS, Setup
from plait.algorithms.rows import expert_row, rollout_rows
from plait.engine.errors import DataError
from plait.engine.types import Demonstration, Prompt, Rollout, RolloutGroup, Sampling, Score, Source
from plait.launch.demonstrations import check_demonstrations
from plait.rollouts.records import Record

COLUMNS: dict[str, Any] = {"token_weights": (1.0, 0.0, 2.0), "base_logprobs": (-1.0, -2.0, -3.0)}


def make_prompt(*demonstrations: Demonstration) -> Prompt:
    return Prompt("p", ({"role": "user", "content": "?"},), (5, 6), demonstrations=demonstrations)


def demonstrate(*ids: int, score: Score | None = None, **columns: Any) -> Demonstration:
    return Demonstration(ids, "", columns=columns, score=score)


def build(**expert_loss: Any):
    config = ALGORITHMS["sft"].Config.model_validate({"type": "sft", "expert_loss": expert_loss})
    return ALGORITHMS["sft"](config, Setup(Sampling(8)))


@pytest.mark.parametrize("limit", [3, 2])
def test_columns_are_cut_with_the_response(limit):
    prompt = make_prompt(demonstrate(7, 8, 2, **COLUMNS))
    row = expert_row(prompt, prompt.demonstrations[0], limit)
    assert row.weights.tolist() == [1, 1, 1, 0, 2][: 2 + limit]
    assert row.columns.keys() == {"base_logprobs"}
    np.testing.assert_array_equal(
        row.columns["base_logprobs"], [np.nan, np.nan, -1, -2, -3][: 2 + limit]
    )
    assert row.sample_id == "p#0"


def test_a_prefix_takes_the_columns_of_its_demonstration():
    prompt = make_prompt(demonstrate(9, 2), demonstrate(7, 8, 2, **COLUMNS))
    rollout = Rollout("p", 0, (7, 8, 4, 2), 2, (-0.5, -0.5), 0, "stop", "")
    (row,) = rollout_rows([RolloutGroup(prompt, (rollout,), (Score.ok(1.0),))])
    assert row.source.tolist() == [Source.CONTEXT] * 2 + [Source.EXPERT] * 2 + [Source.POLICY] * 2
    assert row.weights.tolist() == [1, 1, 1, 0, 1, 1]
    nan = np.nan
    np.testing.assert_array_equal(row.columns["base_logprobs"], [nan, nan, -1, -2, nan, nan])
    assert row.sample_id == "p#1"


def test_scores_become_rewards_only_where_the_expert_loss_reads_them():
    unknown = demonstrate(4, 2, score=Score.unknown("deadline"))
    right, wrong = (demonstrate(7, 2, score=Score.ok(r)) for r in (1.0, 0.0))
    prompt = make_prompt(right, wrong, unknown)
    rows = build(type="rift").demonstration_rows([prompt])
    assert [row.reward for row in rows] == [1.0, 0.0]  # an UNKNOWN score trains nothing
    rows = build(type="nll").demonstration_rows([prompt])
    assert [row.reward for row in rows] == [None]


def record(number: int, **columns: Any) -> Record:
    scores = columns.pop("scores", ())
    stored = {name: (values,) for name, values in columns.items()}
    return Record(f"p{number}", (), demonstrations=("4",), scores=scores, columns=stored)


@pytest.mark.parametrize(
    ("loss", "columns"),
    [
        ("token_weight", ["token_weights"]),
        ("token_cleaning", ["base_logprobs"]),
        ("sstoken", ["history_logprobs", "prompt_attention"]),
        ("topr", ["behaviour_logprobs"]),
    ],
)
def test_data_without_a_needed_column_is_refused(loss, columns):
    algorithm = build(type=loss)
    full = dict.fromkeys(columns, (1.0,))
    whole = record(0, **full)
    check_demonstrations(algorithm, [whole], graded=True)
    for column in columns:
        kept = {name: values for name, values in full.items() if name != column}
        with pytest.raises(DataError) as caught:
            check_demonstrations(algorithm, [whole, record(1, **kept)], graded=True)
        text = str(caught.value)
        assert f"{column}: 1 of 2 rows with a demonstration lack it, for example 'p1'" in text
        assert repr(loss) in text
        assert "data.columns" in text


def test_scores_come_from_the_data_or_from_the_reward():
    rift = build(type="rift")
    stored = record(0, scores=(0.0,))
    check_demonstrations(rift, [stored], graded=False)
    check_demonstrations(rift, [stored, record(1)], graded=True)
    with pytest.raises(DataError, match=r"'rift' reads the score.* 1 of 2 rows.*'p1'.*a reward"):
        check_demonstrations(rift, [stored, record(1)], graded=False)


def test_sstoken_by_gain_alone_needs_no_attention():
    loss = build(type="sstoken", loss_gap_weight=1.0)
    check_demonstrations(loss, [record(0, history_logprobs=(1.0,))], graded=True)
