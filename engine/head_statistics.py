"""Log-prob and entropy of chosen tokens straight from hidden states: the LM head and its backward pass in one function.

Logits exist for one chunk of tokens at a time and are computed again in the backward pass, where their gradient

    g (onehot - p) - h p (log p + H)      g, h: gradients of the log-prob and of the entropy H

is written down, not recorded. Softmax and sums over the vocabulary are float32 (float64 for float64 weights).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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


def chunk_logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """[n, V] in the precision of softmax."""
    logits = hidden @ weight.T
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if softcap is None else torch.tanh(wide / softcap) * softcap


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
        logprobs, normalizers, entropies = [], [], []
        for part, wanted in zip(
            hidden.split(chunk_tokens), tokens.split(chunk_tokens), strict=True
        ):
            logits = chunk_logits(part, weight, softcap)
            normalizer = logits.logsumexp(-1)
            logprobs.append(logits.gather(-1, wanted[:, None]).squeeze(-1) - normalizer)
            normalizers.append(normalizer)
            if entropy:
                probabilities = (logits - normalizer[:, None]).exp_()
                entropies.append(normalizer - probabilities.mul_(logits).sum(-1))
        found = torch.cat(logprobs)
        uncertainty = torch.cat(entropies) if entropy else found.new_zeros(0)
        ctx.save_for_backward(hidden, weight, tokens, torch.cat(normalizers), uncertainty)
        ctx.softcap, ctx.chunk_tokens, ctx.entropy = softcap, chunk_tokens, entropy
        return found, uncertainty

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens, normalizers, entropies = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight: Tensor | None = None
        several = len(tokens) > ctx.chunk_tokens
        for start in range(0, len(tokens), ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            logits = chunk_logits(hidden[part], weight, ctx.softcap)
            slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap) ** 2
            of_logprob = gradients[0][part, None]
            logits -= normalizers[part, None]
            if ctx.entropy:
                factor = (logits + entropies[part, None]).mul_(-gradients[1][part, None])
                slopes = logits.exp_().mul_(factor.sub_(of_logprob))
            else:
                slopes = logits.exp_().mul_(-of_logprob)
            rows = torch.arange(len(slopes), device=slopes.device)
            slopes[rows, tokens[part]] += of_logprob.squeeze(-1)
            if slope is not None:
                slopes *= slope
            slopes = slopes.to(hidden.dtype)
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
