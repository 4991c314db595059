"""Golden rows of expert losses: columns beyond the shared ones, and the traces of types that remember."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..algorithms.expert_losses import Eaft, Glow, TokenWeight
from ..engine.batch import collate
from ..engine.model import full_kl, topk_entropy
from ..engine.types import PolicyOutput, Sample, Source, TrainBatch

Case = Mapping[str, Any]


class CaseError(ValueError):
    """The case names something unknown, or an expected key was not produced."""


def remembered(rows: Sequence[Case]) -> dict[str, float]:
    """What the run would remember of the rows: sample id -> mean loss at the last visit."""
    visited = [row for row in rows if row.get("previous_loss") is not None]
    return {sample_id(row): row["previous_loss"] for row in visited}


def sample_id(row: Case) -> str:
    return row.get("sample_id") or row["group"]


def check_columns(rows: Sequence[Case], algorithm: Any) -> None:
    """Columns whose absence the batch cannot show: raises CaseError where the expert loss insists on one."""
    loss = getattr(algorithm.config, "expert_loss", None)
    if isinstance(loss, TokenWeight):
        for row in rows:
            if (
                row["source"] == "expert"
                and row.get("response_ids")
                and not row.get("token_weights")
            ):
                raise CaseError("expert_loss token_weight needs token_weights on every expert row")


def with_expert_columns(
    out: PolicyOutput,
    batch: TrainBatch,
    logits: Sequence[Tensor],
    rows: Sequence[Case],
    algorithm: Any,
) -> PolicyOutput:
    """KL to `ref_logits` and top-k entropy where the expert loss needs them: float64 [T], 0 on untrained tokens."""
    loss = getattr(algorithm.config, "expert_loss", None)
    needs = loss.needs if loss is not None else frozenset()

    def laid_out(values: Sequence[Tensor | None]) -> Tensor:
        lengths = batch.row_starts.diff().tolist()
        parts = [
            torch.zeros(n, dtype=torch.float64) if v is None else torch.cat([v.new_zeros(1), v])
            for n, v in zip(lengths, values, strict=True)
        ]
        return torch.cat(parts).where(batch.trained, 0.0)

    if "ref_kl" in needs:
        pairs = [golden_kl(leaf, row) for leaf, row in zip(logits, rows, strict=True)]
        out = replace(
            out,
            forward_kl=laid_out([pair and pair[0] for pair in pairs]),
            reverse_kl=laid_out([pair and pair[1] for pair in pairs]),
        )
    if isinstance(loss, Eaft):
        entropies = [topk_entropy(leaf, loss.top_k) if leaf.ndim == 2 else None for leaf in logits]
        sizes = [leaf.shape[-1] for leaf in logits if leaf.ndim == 2]
        out = replace(out, topk_entropy=laid_out(entropies), vocabulary=max(sizes, default=2))
    return out


def golden_kl(logits: Tensor, row: Case) -> tuple[Tensor, Tensor] | None:
    """KL(ref || pi) and KL(pi || ref) per position; None on rows that have no tokens or are not supervised."""
    if (row["source"] != "expert" and row.get("ref_logits") is None) or logits.ndim != 2:
        return None
    if row.get("ref_logits") is None:
        raise CaseError("expert_loss asft needs ref_logits on every expert row")
    return full_kl(logits, torch.tensor(row["ref_logits"], dtype=torch.float64))


def trace_expert_loss(algorithm: Any, entries: Sequence[Case]) -> list[dict[str, Any]]:
    """glow, from a fresh memory: all weights of a step are computed before its losses are stored."""
    loss = algorithm.config.expert_loss
    if not isinstance(loss, Glow):
        raise CaseError(
            f"expert_loss {loss.type} has no trace; known: glow, discriminative_ft, input hooks"
        )
    outputs = []
    for entry in entries:
        rows = entry["rows"]
        # One supervised token a row, whose loss is the row's.
        samples = [one_token_row(row["sample_id"]) for row in rows]
        losses = torch.tensor([row["loss"] for row in rows], dtype=torch.float64)
        logprobs = torch.stack([torch.zeros_like(losses), -losses], 1).flatten()
        batch = algorithm.prepare(collate(samples, torch.float64), logprobs, {})
        outputs.append({"weights": loss.weights(losses, batch.previous_losses).tolist()})
        algorithm.remember(batch)
    return outputs


def one_token_row(name: str) -> Sample:
    zeros = np.zeros(2)
    source = np.asarray([Source.CONTEXT, Source.EXPERT], dtype=np.int8)
    ids = np.zeros(2, dtype=np.int32)
    return Sample(ids, source, zeros, zeros + 1, zeros + np.nan, group_id=name, sample_id=name)
