"""Gradients that are measured and thrown away: what each source's tokens pull at, and whether two losses agree.

Nothing of a run changes: the parameters, the moments and the random state are those of before, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from .types import PolicyOutput, Source, TokenSamples, TrainBatch

Output = TypeVar("Output", PolicyOutput, TokenSamples)


def keep_source(out: Output, batch: TrainBatch, source: Source) -> Output:
    """The same values, with a gradient on tokens of `source` only.

    A loss differentiates through these columns and nothing else, so the gradients of the two sources add up to the
    whole one, whatever the loss mixes.
    """
    mask = batch.source == source
    kept = {}
    for field in fields(out):
        value = getattr(out, field.name)
        if isinstance(value, TokenSamples):
            kept[field.name] = keep_source(value, batch, source)
        elif isinstance(value, Tensor):
            kept[field.name] = value.where(mask, value.detach())
    return replace(out, **kept)


def gram_matrix(shares: Sequence[dict[str, Tensor]]) -> Tensor:
    """float64 [k, k]: dot products of k gradients, over the parts that this rank holds."""
    total = torch.zeros(len(shares), len(shares), dtype=torch.float64)
    for name in dict.fromkeys(name for share in shares for name in share):
        rows = {i: share[name].double() for i, share in enumerate(shares) if name in share}
        for i, one in rows.items():
            for j, other in rows.items():
                # Pair by pair: a product of matrices rounds differently with the number of probes.
                total[i, j] += one.dot(other)
    return total
