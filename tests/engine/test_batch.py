"""Cutting a batch never loses, repeats or reorders a token."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rows import make_row, make_rows

from plait.engine.batch import (
    blank,
    collate,
    count,
    select,
    split_minibatches,
)
from plait.engine.types import Source


def test_rows_lie_end_to_end():
    rows = make_rows("pe")
    batch = collate(rows)
    n = len(rows[0])
    assert batch.row_starts.tolist() == [0, n, n + len(rows[1])]
    assert batch.position_ids.tolist() == [*range(n), *range(len(rows[1]))]
    assert batch.input_ids.tolist() == [*rows[0].token_ids, *rows[1].token_ids]
    assert batch.rewards[0] == 0.0
    assert batch.rewards[1].isnan(), "a row that was never scored has no reward"


def test_counts_are_by_source():
    batch = collate(make_rows("ppehe"))
    denom = batch.denom
    assert denom.policy_rows == 3
    assert denom.expert_rows == 3, "a hybrid row counts for both sources"
    assert denom.rows == 5
    assert denom.policy_tokens + denom.expert_tokens == denom.tokens
    assert denom.tokens == int((batch.source != Source.CONTEXT).sum())


def test_zero_weights_leave_the_counts():
    rows = make_rows("pe")
    rows[1].weights[:] = 0
    assert collate(rows).denom.expert_tokens == 0


@pytest.mark.parametrize("bad", ["empty", "trained first token"])
def test_unusable_rows_are_refused(bad):
    (row,) = make_rows("p")
    if bad == "empty":
        row = type(row)(*([np.zeros(0)] * 5), group_id="g")
        with pytest.raises(ValueError, match="no tokens"):
            collate([row])
    else:
        row.source[0] = Source.POLICY
        with pytest.raises(ValueError, match="must start with context"):
            collate([row])


def test_select_takes_rows_with_all_their_columns():
    batch = collate(make_rows("pephe"))
    part = select(batch, [3, 1])
    rows = batch.row_ids
    wanted = torch.cat([batch.input_ids[rows == 3], batch.input_ids[rows == 1]])
    assert torch.equal(part.input_ids, wanted)
    assert part.num_rows == 2
    assert part.rewards[0] == 1.0
    assert part.denom == batch.denom, "denominators stay those of the whole"
    assert select(batch, []).num_rows == 0


def test_a_blank_batch_trains_nothing():
    batch = collate(make_rows("pe"))
    empty = blank(select(batch, []))
    assert empty.num_rows == 1
    assert not empty.trained.any()


@given(st.integers(1, 4), st.integers(0, 5))
def test_minibatches_keep_groups_whole_and_deal_experts_out(num, seed):
    batch = collate(make_rows("pp" * 4 + "ee" * 4))
    parts = split_minibatches(batch, num, seed)
    assert sorted(row for part in parts for row in part) == list(range(batch.num_rows))
    for part in parts:
        groups = batch.group_ids[part].tolist()
        assert all(groups.count(group) == 2 for group in groups)
        counted = count(select(batch, part))
        assert abs(counted.policy_rows - counted.expert_rows) <= 2


def test_stored_columns_are_laid_out_and_selected():
    rng = np.random.default_rng(0)
    rows = [make_row(rng, kind, i) for i, kind in enumerate("pee")]
    column = np.arange(len(rows[1]), dtype=np.float32)
    rows[1] = replace(rows[1], columns={"base_logprobs": column}, sample_id="e1#0")
    batch = collate(rows)
    assert batch.base_logprobs is not None
    assert batch.history_logprobs is None
    own = batch.row_ids == 1
    assert batch.base_logprobs[own].tolist() == column.tolist()
    assert bool(batch.base_logprobs[~own].isnan().all())
    part = select(batch, [2, 1])
    assert part.sample_ids == ("", "e1#0")
    assert part.group_names == (rows[2].group_id, rows[1].group_id)
    assert part.base_logprobs is not None
    assert part.base_logprobs[part.row_ids == 1].tolist() == column.tolist()
    assert len(blank(batch).sample_ids) == 1
