"""Golden cases of an algorithm with a critic: the value loss, and advantages of each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..algorithms import AlgorithmBase
from ..engine.batch import collate, select
from ..engine.types import PolicyOutput, TrainBatch
from .golden_case import overridden
from .golden_rows import column, row_sample, with_columns

Case = Mapping[str, Any]


def run_value_loss(case: Case, algorithm: AlgorithmBase, update: str) -> dict[str, Any]:
    """The loss that trains the critic, whole or in micro-batches, and its gradient by the critic's present values.

    `returns` are the case's own; `finish` is not asked for them.
    """
    rows = case["rows"]
    samples = algorithm.credit([row_sample(row) for row in rows])
    batch = with_columns(collate(samples, torch.float64), rows, algorithm.needs[update])
    coefs = overridden(algorithm.update(samples, {}).coefs, case)
    values = column(rows, "new_values").requires_grad_()
    parts = case.get("micro_batches", [list(range(len(rows)))])
    spans = torch.arange(len(values)).split(batch.row_starts.diff().tolist())
    loss, metrics = values.nan_to_num().sum() * 0.0, dict[str, Tensor]()
    for part in parts:
        chosen = values[torch.cat([torch.arange(0), *(spans[i] for i in part)])]
        out = PolicyOutput(torch.full_like(chosen, torch.nan), values=chosen)
        result = algorithm.losses[update](out, select(batch, part), coefs)
        loss = loss + result.loss
        for name, value in result.metrics.items():
            metrics[name] = metrics.get(name, torch.zeros(())) + value
    loss.backward()
    assert values.grad is not None
    return {
        "loss": loss.item(),
        "grad_values": by_row(values.grad, batch),
        "metrics": {**{name: value.item() for name, value in metrics.items()}, **coefs},
    }


def token_advantages(case: Case, algorithm: AlgorithmBase) -> dict[str, Any]:
    """Advantages and returns of each response token after `finish`."""
    rows = case["rows"]
    samples = algorithm.credit([row_sample(row) for row in rows])
    batch = with_columns(collate(samples, torch.float64), rows, algorithm.needs["main"])
    batch = algorithm.finish(batch)
    assert batch.returns is not None
    advantages = batch.advantages * (batch.weights != 0)
    return {"advantages": by_row(advantages, batch), "returns": by_row(batch.returns, batch)}


def by_row(values: Tensor, batch: TrainBatch) -> list[list[float]]:
    """[T] -> one list a row, of its response tokens."""
    return [row[1:].tolist() for row in values.split(batch.row_starts.diff().tolist())]
