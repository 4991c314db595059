"""One-token rollouts: K tokens drawn at every trained position, and the sums over them that a loss needs.

Draws are a function of (row seed, position, j) and nothing else, so packing, micro-batches, ranks and the recomputation
in the backward pass all see the same tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .types import TokenSampling

# splitmix64 (Steele, Lea, Flood 2014), written for signed 64-bit integers, which wrap.
STEP = 0x9E3779B97F4A7C15 - 2**64
FIRST = 0xBF58476D1CE4E5B9 - 2**64
SECOND = 0x94D049BB133111EB - 2**64


def uniforms(seeds: Tensor, positions: Tensor, num: int) -> Tensor:
    """Seed and position of each token, i64 [n] -> float64 [n, num] in [0, 1)."""
    streams = _mix(seeds ^ _mix(positions * STEP))
    counters = torch.arange(1, num + 1, device=seeds.device) * STEP
    return _shift(_mix(streams[:, None] + counters), 11).double() * 2.0**-53


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """logits [n, V], uniforms [n, K] -> token ids [n, K].

    The smallest index whose cumulative tempered probability exceeds the uniform; the last index if none does.
    """
    cumulative = (logits.detach() / temperature).softmax(-1).cumsum(-1)
    ids = torch.searchsorted(cumulative, uniforms.to(cumulative.dtype), right=True)
    return ids.clamp(max=logits.shape[-1] - 1)


def sampled_sums(
    logits: Tensor, targets: Tensor, samples: Tensor, sampling: TokenSampling
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of TokenSamples, [n] each: logits [n, V], targets [n], samples [n, K]."""
    logits = _differentiated(logits, sampling)
    logprobs = logits.gather(-1, samples) - logits.logsumexp(-1, keepdim=True)
    hits = samples == targets[:, None]
    return (
        hits.to(logits.dtype).mean(-1),
        logprobs.where(hits, 0.0).mean(-1),
        logprobs.where(~hits, 0.0).mean(-1),
    )


def expected_sums(
    logits: Tensor, targets: Tensor, sampling: TokenSampling
) -> tuple[Tensor, Tensor, Tensor]:
    """The limit of `sampled_sums` for infinitely many samples; the probabilities are constants."""
    wide = logits.detach() if logits.dtype == torch.float64 else logits.detach().float()
    frequencies = (wide / sampling.temperature).softmax(-1)
    logprobs = _differentiated(logits, sampling).log_softmax(-1)
    hit_rate = frequencies.gather(-1, targets[:, None]).squeeze(-1)
    hits = hit_rate * logprobs.gather(-1, targets[:, None]).squeeze(-1)
    return hit_rate, hits, (frequencies * logprobs).sum(-1) - hits


def _differentiated(logits: Tensor, sampling: TokenSampling) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits / sampling.temperature if sampling.tempered_logprobs else logits


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * FIRST
    x = (x ^ _shift(x, 27)) * SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
