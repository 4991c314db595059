"""Tokens that several rows begin with are computed once: a group's prompt, and a hint or forced prefix of all its rows.

The rows of a micro-batch are laid out as stretches: each shared prefix, then what every row has of its own. A token
attends to its own stretch, causally, and to all of the prefix that the stretch continues, so its hidden state and its
gradient are those of the whole row. Prefix sharing as in arXiv 2506.05433, without padding and without a [T, T] mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .types import Source, TrainBatch


@dataclass(frozen=True)
class Stretches:
    """C computed tokens for the T tokens of a batch.

    Rows `17 10 | 28 2` and `17 10 | 9` that share two tokens: tokens [0, 1, 2, 3, 6], places [0, 1, 2, 3, 0, 1, 4],
    lengths [2, 2, 1], continues [None, 0, 0].
    """

    tokens: Tensor  # i64 [C]: numbers of the tokens that are computed, in order
    places: Tensor  # i64 [T]: where in that order each token's state is
    lengths: list[int]
    continues: list[int | None]
    """Of each stretch: the number of the stretch that comes before it in its row; None where it begins one."""


def mark_prefixes(batch: TrainBatch) -> TrainBatch:
    """Note which rows begin alike: rows with the same leading context, and how many tokens all of them share.

    At least one token is left to each row. Rows with hidden tokens are not marked: those may differ.
    """
    if batch.hidden is not None or batch.num_rows < 2:
        return batch
    starts = batch.row_starts.tolist()
    ids, context = batch.input_ids.numpy(), (batch.source == Source.CONTEXT).numpy()
    alike: dict[bytes, list[int]] = {}
    for row, (start, end) in enumerate(pairwise(starts)):
        leading = int(context[start:end].argmin())  # 0 where all is context
        if leading:
            alike.setdefault(ids[start : start + leading].tobytes(), []).append(row)
    prefix_ids, prefix_lengths = [-1] * batch.num_rows, [0] * batch.num_rows
    for number, rows in enumerate(rows for rows in alike.values() if len(rows) > 1):
        common = common_length([ids[starts[row] : starts[row + 1]] for row in rows])
        for row in rows:
            prefix_ids[row], prefix_lengths[row] = number, common
    return replace(
        batch, prefix_ids=torch.tensor(prefix_ids), prefix_lengths=torch.tensor(prefix_lengths)
    )


def common_length(rows: Sequence[np.ndarray]) -> int:
    """Tokens that all rows begin with, less than the shortest has.

    >>> common_length([np.array([5, 6, 7, 8]), np.array([5, 6, 9, 8])])
    2
    """
    longest = min(map(len, rows)) - 1
    equal = np.all([row[:longest] == rows[0][:longest] for row in rows], axis=0)
    return longest if equal.all() else int(equal.argmin())


def lay_out(batch: TrainBatch) -> Stretches | None:
    """None where no two rows share anything."""
    if batch.prefix_ids is None or batch.prefix_lengths is None:
        return None
    starts, ids = batch.row_starts.tolist(), batch.prefix_ids.tolist()
    shared = batch.prefix_lengths.tolist()
    members: dict[int, list[int]] = {}
    for row, number in enumerate(ids):
        members.setdefault(number if shared[row] else -1 - row, []).append(row)
    if all(len(rows) == 1 for rows in members.values()):
        return None
    spans: list[tuple[int, int]] = []
    continues: list[int | None] = []
    places = torch.empty(starts[-1], dtype=torch.long)
    at = 0

    def add(start: int, end: int, continued: int | None) -> None:
        nonlocal at
        spans.append((start, end))
        continues.append(continued)
        places[start:end] = torch.arange(at, at + end - start)
        at += end - start

    for rows in members.values():
        first = rows[0]
        if len(rows) == 1:
            add(starts[first], starts[first + 1], None)
            continue
        length, prefix = shared[first], len(spans)
        add(starts[first], starts[first] + length, None)
        for row in rows:
            places[starts[row] : starts[row] + length] = places[
                starts[first] : starts[first] + length
            ]
            add(starts[row] + length, starts[row + 1], prefix)
    device = batch.input_ids.device
    tokens = torch.cat([torch.arange(*span) for span in spans])
    lengths = [end - start for start, end in spans]
    return Stretches(tokens.to(device), places.to(device), lengths, continues)
