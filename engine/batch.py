"""Rows -> one flat batch -> minibatches. Pure; no collectives, no model.

A row is never split. Whole minibatches decide the denominators, so every cut below gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .types import Denominators, Sample, Source, TrainBatch

ROW_FIELDS = (
    "rewards",
    "group_ids",
    "row_seeds",
    "previous_losses",
    "log_normalizers",
    "pairs",
    "logit_norms",
    "logit_sketches",
    "prefix_ids",
    "prefix_lengths",
)
PAIR_ROLES = {"chosen": 1, "rejected": -1, None: 0}


def collate(samples: Sequence[Sample], dtype: torch.dtype = torch.float32) -> TrainBatch:
    """Lay rows end to end; see TrainBatch for a worked example.

    Raises ValueError when a row is empty or its first token would be trained (nothing predicts it).
    """
    for i, sample in enumerate(samples):
        if len(sample) == 0:
            raise ValueError(f"row {i} of group {sample.group_id!r} has no tokens")
        if sample.source[0] != Source.CONTEXT and sample.weights[0] != 0:
            raise ValueError(
                f"row {i} of group {sample.group_id!r}: its first token has source "
                f"{Source(int(sample.source[0])).name}; nothing predicts it, so a row must start with context"
            )
    lengths = torch.tensor([len(sample) for sample in samples], dtype=torch.long)
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    row_ids = torch.repeat_interleave(torch.arange(len(samples)), lengths)
    groups = {name: i for i, name in enumerate(dict.fromkeys(s.group_id for s in samples))}

    def tokens(name: str, kind: torch.dtype) -> Tensor:
        if not samples:
            return torch.zeros(0, dtype=kind)
        return torch.from_numpy(np.concatenate([getattr(s, name) for s in samples])).to(kind)

    def optional(name: str, default: Callable[[Sample], np.ndarray]) -> Tensor | None:
        values = [getattr(s, name) for s in samples]
        if all(value is None for value in values):
            return None
        filled = zip(values, samples, strict=True)
        return torch.from_numpy(np.concatenate([default(s) if v is None else v for v, s in filled]))

    labels = optional("labels", lambda s: s.token_ids)
    paired = any(s.pair for s in samples)
    batch = TrainBatch(
        input_ids=tokens("token_ids", torch.long),
        position_ids=torch.arange(int(starts[-1])) - starts[row_ids],
        row_ids=row_ids,
        row_starts=starts,
        source=tokens("source", torch.long),
        advantages=tokens("advantages", dtype),
        weights=tokens("weights", dtype),
        rollout_logprobs=tokens("rollout_logprobs", dtype),
        rewards=torch.tensor(
            [float("nan") if (r := s.shaped_reward) is None else r for s in samples], dtype=dtype
        ),
        group_ids=torch.tensor([groups[s.group_id] for s in samples], dtype=torch.long),
        denom=Denominators(0, 0, 0, 0, 0, 0),
        group_names=tuple(s.group_id for s in samples),
        sample_ids=tuple(s.sample_id for s in samples),
        pairs=torch.tensor([PAIR_ROLES[s.pair] for s in samples]) if paired else None,
        labels=None if labels is None else labels.long(),
        hidden=optional("hidden", lambda s: np.zeros(len(s), dtype=bool)),
        row_seeds=torch.tensor([seed_of(s.group_id, i) for i, s in enumerate(samples)]).long(),
    )
    columns = {name: stored_column(samples, name, dtype) for name in stored_names(samples)}
    return replace(batch, denom=count(batch), **columns)


def stored_names(samples: Sequence[Sample]) -> set[str]:
    return set().union(*(sample.columns for sample in samples))


def stored_column(samples: Sequence[Sample], name: str, dtype: torch.dtype) -> Tensor:
    """[T] of what the data stores, NaN on rows that have no such column."""
    parts = [sample.columns.get(name, np.full(len(sample), np.nan)) for sample in samples]
    return torch.from_numpy(np.concatenate(parts)).to(dtype)


def seed_of(*key: object) -> int:
    """63 bits that depend on every part of the key, and on nothing else."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest()) >> 1


def count(batch: TrainBatch) -> Denominators:
    """Member tokens and rows of the whole batch, by source."""

    def members(mask: Tensor) -> tuple[int, int]:
        return int(mask.sum()), len(batch.row_ids[mask].unique())

    policy_tokens, policy_rows = members(batch.is_trained(Source.POLICY))
    expert_tokens, expert_rows = members(batch.is_trained(Source.EXPERT))
    tokens, rows = members(batch.trained)
    positive_tokens = int((batch.is_trained(Source.POLICY) & (batch.advantages > 0)).sum())
    return Denominators(
        policy_tokens, expert_tokens, policy_rows, expert_rows, tokens, rows, positive_tokens
    )


def select(batch: TrainBatch, rows: Sequence[int]) -> TrainBatch:
    """The named rows, in that order. Denominators stay those of `batch`."""
    index = torch.as_tensor(rows, dtype=torch.long)
    lengths = batch.row_starts.diff()[index]
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    row_ids = torch.repeat_interleave(torch.arange(len(index)), lengths)
    # Token j of new row i is token j of old row index[i].
    tokens = torch.arange(int(starts[-1])) - starts[row_ids] + batch.row_starts[index][row_ids]
    taken: dict[str, Any] = {"row_ids": row_ids, "row_starts": starts}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, tuple) and value:
            taken[field.name] = tuple(value[row] for row in rows)
        elif field.name not in taken and isinstance(value, Tensor):
            taken[field.name] = value[index if field.name in ROW_FIELDS else tokens]
    return replace(batch, **taken)


def has_gradient(batch: TrainBatch, advantage_only: frozenset[Source]) -> Tensor:
    """bool [N]: rows that may have a gradient.

    A row has none where it trains no token, or only tokens of sources in `advantage_only` whose advantage is 0. Rows
    that are compared with others are taken to have one.
    """
    live = batch.trained
    for source in advantage_only:
        live = live & ~((batch.source == source) & (batch.advantages == 0))
    rows = torch.zeros(batch.num_rows, dtype=torch.bool)
    rows[batch.row_ids[live]] = True
    return rows if batch.pairs is None else rows | (batch.pairs != 0)


def with_gradient(batch: TrainBatch, advantage_only: frozenset[Source]) -> TrainBatch:
    """The rows that may have a gradient; denominators stay those of all rows, and say what was left out."""
    kept = has_gradient(batch, advantage_only)
    if bool(kept.all()):
        return batch
    absent = count(select(batch, (~kept).nonzero().squeeze(-1).tolist()))
    rest = select(batch, kept.nonzero().squeeze(-1).tolist())
    return replace(rest, denom=replace(batch.denom, left_out=absent))


def blank(batch: TrainBatch) -> TrainBatch:
    """One row of two CONTEXT tokens with the same columns as `batch`: computes, trains nothing."""
    rows: dict[str, Any] = {
        "row_starts": torch.tensor([0, 2]),
        "position_ids": torch.arange(2),
        "group_names": ("",),
        "sample_ids": ("",),
    }
    for field in fields(batch):
        value = getattr(batch, field.name)
        if field.name not in rows and isinstance(value, Tensor):
            rows[field.name] = torch.zeros(1 if field.name in ROW_FIELDS else 2, dtype=value.dtype)
    return replace(batch, **rows)


def from_sequences(sequences: Sequence[Sequence[int]]) -> TrainBatch:
    """Rows whose every token but the first counts as trained: for asking log-probs."""
    samples = []
    for i, sequence in enumerate(sequences):
        n = len(sequence)
        source = np.full(n, Source.EXPERT, dtype=np.int8)
        source[0] = Source.CONTEXT
        zeros = np.zeros(n, dtype=np.float32)
        ids = np.asarray(sequence, dtype=np.int32)
        samples.append(Sample(ids, source, zeros, zeros + 1, zeros + np.nan, group_id=str(i)))
    return collate(samples)


def split_minibatches(batch: TrainBatch, num: int, seed: int) -> list[list[int]]:
    """Rows of each optimizer step: groups are shuffled and dealt out whole.

    Groups that hold only expert rows are dealt separately, so both streams enter each minibatch in proportion.
    """
    if num == 1:
        return [list(range(batch.num_rows))]
    rows_of: dict[int, list[int]] = {}
    for row, group in enumerate(batch.group_ids.tolist()):
        rows_of.setdefault(group, []).append(row)
    has_policy = set(batch.row_ids[batch.source == Source.POLICY].tolist())
    kinds: list[list[list[int]]] = [[], []]
    for rows in rows_of.values():
        kinds[int(has_policy.isdisjoint(rows))].append(rows)
    rng = np.random.default_rng(seed)
    parts: list[list[int]] = [[] for _ in range(num)]
    for groups in kinds:
        order = rng.permutation(len(groups))
        for part, chosen in zip(parts, np.array_split(order, num), strict=True):
            part.extend(row for i in chosen for row in groups[i])
    return [sorted(part) for part in parts if part]
