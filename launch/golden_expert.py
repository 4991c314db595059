"""Golden rows of expert losses: columns beyond the shared ones, and the traces of types that remember."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..algorithms.expert_losses import Eaft, Glow
from ..engine.batch import collate
from ..engine.contracts import Need
from ..engine.model import full_kl, topk_entropy
from ..engine.types import PolicyOutput, Sample, Source, TrainBatch

Case = Mapping[str, Any]
COLUMN_OF_NEED: Mapping[Need, str] = {
    "old_logprobs": "old_logprobs",
    "behaviour_logprobs": "old_logprobs",
    "ref_logprobs": "ref_logprobs",
    "ref_kl": "ref_logits",
    "base_logprobs": "base_logprobs",
    "history_logprobs": "history_logprobs",
    "prompt_attention": "prompt_attention",
    "token_weights": "token_weights",
    "pairs": "pair",
    "demonstration_scores": "reward",
}
"""Row key of each need of an expert loss that a golden row must bring."""


class CaseError(ValueError):
    """The case names something unknown, or an expected key was not produced."""


def remembered(rows: Sequence[Case]) -> dict[str, float]:
    """What the run would remember of the rows, each a sample of its own: its mean loss at the last visit."""
    losses = {f"row {i}": row.get("previous_loss") for i, row in enumerate(rows)}
    return {name: loss for name, loss in losses.items() if loss is not None}


def check_columns(rows: Sequence[Case], algorithm: Any, update: str) -> None:
    """Raises CaseError where a row with supervised tokens lacks what the expert loss of this update needs."""
    loss = getattr(algorithm.config, "expert_loss", None)
    if loss is None or not loss.needs <= algorithm.needs[update]:
        return
    needed = sorted(COLUMN_OF_NEED[need] for need in loss.needs & COLUMN_OF_NEED.keys())
    for i, row in enumerate(rows):
        missing = [key for key in needed if row.get(key) is None]
        if missing and num_supervised(row):
            raise CaseError(f"row {i} has no {missing[0]}, which expert_loss {loss.type} needs")


def num_supervised(row: Case) -> int:
    """EXPERT tokens of weight not 0."""
    length = len(row.get("response_ids") or [])
    prefix = length if row["source"] == "expert" else row.get("prefix_len") or 0
    weights = row.get("token_weights") or [1.0] * length
    return sum(weight != 0 for weight in weights[:prefix])


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
    """KL(ref || pi) and KL(pi || ref) per position; None on rows that have no tokens or no reference."""
    if row.get("ref_logits") is None or logits.ndim != 2:
        return None
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
