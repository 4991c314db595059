"""Log-prob and entropy of chosen tokens straight from hidden states: the LM head and its backward pass in one function.

Logits exist for one chunk of tokens at a time and are computed again in the backward pass, where their gradient

    g (onehot - p) - h p (log p + H)      g, h: gradients of the log-prob and of the entropy H

is written down, not recorded. Softmax and sums over the vocabulary are float32 (float64 for float64 weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

CACHED_LOGITS = 1 << 20
"""Logits that are passed over in one go on the CPU: more of them would travel to memory and back with each pass."""


def has_plain_head(model: Any) -> bool:
    """True where the LM head is one matrix that is at hand: no bias, no adapter, not partitioned (ZeRO-3)."""
    head = model.get_output_embeddings()
    return type(head) is nn.Linear and head.bias is None and not hasattr(head.weight, "ds_id")


def head_statistics(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    softcap: float | None,
    chunk_tokens: int,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each token, and entropy where asked for, [n] each, with gradient.

    hidden [n, hidden], weight [V, hidden], tokens [n].
    """
    logprobs, entropies = HeadStatistics.apply(
        hidden, weight, tokens, softcap, chunk_tokens, entropy
    )  # pyright: ignore[reportGeneralTypeIssues]
    return logprobs, entropies if entropy else None


def chunk_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[n, V], before the soft cap."""
    return hidden @ weight.T


def widened(logits: Tensor, softcap: float | None) -> Tensor:
    """The same in the precision of softmax, soft-capped; may share memory with `logits`."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if softcap is None else torch.tanh(wide / softcap) * softcap


def slices(logits: Tensor) -> list[slice]:
    """Rows whose passes over the vocabulary stay in the processor's cache; all of them on a GPU."""
    size = max(1, CACHED_LOGITS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return [slice(start, start + size) for start in range(0, len(logits), size)]


class HeadStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        softcap: float | None,
        chunk_tokens: int,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs, normalizers, entropies = hidden.new_empty(3, len(tokens), dtype=wide)
        for start in range(0, len(tokens), chunk_tokens):
            chunk = chunk_logits(hidden[start : start + chunk_tokens], weight)
            for rows in slices(chunk):
                logits = widened(chunk[rows], softcap)
                part = slice(start + rows.start, start + rows.start + len(logits))
                normalizer = logits.logsumexp(-1)
                chosen = logits.gather(-1, tokens[part, None]).squeeze(-1)
                logprobs[part], normalizers[part] = chosen - normalizer, normalizer
                if entropy:
                    probabilities = (logits - normalizer[:, None]).exp_()
                    entropies[part] = normalizer - probabilities.mul_(logits).sum(-1)
        ctx.save_for_backward(hidden, weight, tokens, normalizers, entropies)
        ctx.softcap, ctx.chunk_tokens, ctx.entropy = softcap, chunk_tokens, entropy
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens, *_ = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight: Tensor | None = None
        several = len(tokens) > ctx.chunk_tokens
        for start in range(0, len(tokens), ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            slopes = chunk_logits(hidden[part], weight)
            for rows in slices(slopes):
                slopes[rows] = logit_gradient(ctx, slopes[rows], start + rows.start, gradients)
            if to_hidden is not None:
                to_hidden[part] = slopes @ weight
            if ctx.needs_input_grad[1]:
                own = slopes.T @ hidden[part]
                if several:  # half-precision sums over many chunks would lose the small ones
                    own = own if own.dtype == torch.float64 else own.float()
                to_weight = own if to_weight is None else to_weight.add_(own)
        if to_weight is not None:
            to_weight = to_weight.to(weight.dtype)
        return to_hidden, to_weight, None, None, None, None


def logit_gradient(ctx: Any, chunk: Tensor, start: int, gradients: Sequence[Tensor]) -> Tensor:
    """[n, V] of the logits of n tokens from number `start` on; writes over them where it can."""
    _, _, tokens, normalizers, entropies = ctx.saved_tensors
    part = slice(start, start + len(chunk))
    logits = widened(chunk, ctx.softcap)
    slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap) ** 2
    of_logprob = gradients[0][part, None]
    logits -= normalizers[part, None]
    if ctx.entropy:
        factor = (logits + entropies[part, None]).mul_(-gradients[1][part, None])
        found = logits.exp_().mul_(factor.sub_(of_logprob))
    else:
        found = logits.exp_().mul_(-of_logprob)
    numbers = torch.arange(len(found), device=found.device)
    found[numbers, tokens[part]] += of_logprob.squeeze(-1)
    return found if slope is None else found.mul_(slope)
