"""Rows of a golden case as the engine sees them: samples, and columns of per-token constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.contracts import Need
from ..engine.types import Sample, Source, TrainBatch

COLUMNS = (
    "old_logprobs",
    "ref_logprobs",
    "values",
    "returns",
    "old_entropy",
    "base_logprobs",
    "history_logprobs",
    "prompt_attention",
)
Case = Mapping[str, Any]


def row_sample(row: Case, sample_id: str = "") -> Sample:
    """A golden row as a Sample: one CONTEXT token (nothing predicts a row's first token), then the response."""
    response = row.get("response_ids") or []
    n, prefix = len(response), row.get("prefix_len") or 0
    kind = {"policy": Source.POLICY, "hybrid": Source.POLICY, "expert": Source.EXPERT}[
        row["source"]
    ]
    source = np.full(n + 1, kind, dtype=np.int8)
    source[0] = Source.CONTEXT
    source[1 : 1 + prefix] = Source.EXPERT
    return Sample(
        token_ids=np.asarray([0, *response], dtype=np.int32),
        source=source,
        advantages=np.zeros(n + 1),
        weights=np.asarray([1.0, *(row.get("token_weights") or [1.0] * n)]),
        rollout_logprobs=np.asarray([np.nan, *(row.get("rollout_logprobs") or [np.nan] * n)]),
        group_id=row["group"],
        reward=row.get("reward"),
        sample_id=sample_id,
        pair=row.get("pair"),
        signature=row.get("signature"),
    )


def scored_sample(row: Case) -> Sample:
    """A golden row that is only scored: one token, which a hybrid row's policy wrote behind a prefix of one."""
    hybrid = row["source"] == "hybrid"
    names = ("source", "group", "reward", "signature", "pair")
    known = {name: row[name] for name in names if name in row}
    return row_sample(
        {**known, "response_ids": [0, 0] if hybrid else [0], "prefix_len": int(hybrid)}
    )


def with_columns(batch: TrainBatch, rows: Sequence[Case], needs: frozenset[Need]) -> TrainBatch:
    """The batch with each column that some row has or the loss needs."""
    present = [name for name in COLUMNS if has(rows, name) or name in needs]
    return replace(batch, **{name: column(rows, name) for name in present})


def has(rows: Sequence[Case], name: str) -> bool:
    return any(row.get(name) is not None for row in rows)


def column(rows: Sequence[Case], name: str) -> Tensor:
    """Per-token constants of all rows, NaN where a row has none."""
    values: list[float] = []
    for row in rows:
        n = len(row.get("response_ids") or [])
        values += [float("nan"), *(row.get(name) or [float("nan")] * n)]
    return torch.tensor(values, dtype=torch.float64)
