"""What data selection sees of a row's logits: their nuclear norm and a short random projection.

The [tokens, vocabulary] logits of a row never exist at once: the norm comes from the eigenvalues of the row's Gram
matrix [tokens, tokens], which is summed over slices of the vocabulary, and so is the projection.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

SKETCH_SIZE = 64
COLUMNS_AT_ONCE = 4096


def gram_matrix(logits: Tensor) -> Tensor:
    """[n, V] -> float64 [n, n] of inner products."""
    logits = logits.double()
    return logits @ logits.T


def nuclear_norm(gram: Tensor) -> Tensor:
    """Sum of the singular values of logits whose Gram matrix this is."""
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()


@cache
def projection(vocabulary: int, device: torch.device) -> Tensor:
    """float32 [V, SKETCH_SIZE], the same in every run and on every rank; preserves distances in expectation."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(vocabulary, SKETCH_SIZE, generator=generator)
    return (matrix / SKETCH_SIZE**0.5).to(device)


@torch.no_grad()
def sketch_rows(
    hidden: Tensor, lengths: list[int], head: Any, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(norms [N], sketches [N, SKETCH_SIZE]) of rows whose supervised tokens' hidden states lie end to end.

    hidden: [sum of lengths, H]; a row of length 0 has norm 0 and sketch 0. The sketch is the projection of the row's
    mean logits. `head` is the output embedding, its weight gathered.
    """
    rows = hidden[: sum(lengths)].split(lengths)
    weight, bias = head.weight, getattr(head, "bias", None)
    project = projection(len(weight), hidden.device)
    norms, sketches = [], []
    for row in rows:
        gram = torch.zeros(len(row), len(row), dtype=torch.float64, device=hidden.device)
        sketch = torch.zeros(SKETCH_SIZE, device=hidden.device)
        for begin in range(0, len(weight) if len(row) else 0, COLUMNS_AT_ONCE):
            part = slice(begin, begin + COLUMNS_AT_ONCE)
            logits = linear(row, weight[part], None if bias is None else bias[part]).float()
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            gram += gram_matrix(logits)
            sketch += logits.mean(0) @ project[part]
        norms.append(nuclear_norm(gram).float())
        sketches.append(sketch)
    return torch.stack(norms), torch.stack(sketches)
