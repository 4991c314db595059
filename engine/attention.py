"""Attention inside each row of a packed batch, for models of the transformers library.

Registered under the name "plait_segments": rows lie end to end in one [1, heads, T, dim] tensor, and each attends only
to itself, causally. Nothing is padded and no [T, T] mask exists. On CUDA, flash-attention's own variable-length kernel
does the same and is preferred.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from .errors import LearnerError
from .shared_prefix import lay_out
from .types import TrainBatch

SEGMENTS = "plait_segments"
SHORT_TOKENS = 512
"""Keys of a row up to which `attend_short` is used: torch's kernel is faster from about 1,000 on."""


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_lengths: list[int],
    continues: list[int | None] | None = None,
    hidden: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, H_kv, T, D] -> [1, T, H, D]; row_lengths sum to T.

    `continues`: of each row, the number of one that comes before it and that it attends to as well (shared_prefix.py).
    `hidden`, bool [T]: tokens whose keys nobody sees.
    """
    shown = [None] * len(row_lengths) if hidden is None else (~hidden).split(row_lengths)
    keys, values = key.split(row_lengths, dim=2), value.split(row_lengths, dim=2)
    outputs = []
    for i, q in enumerate(query.split(row_lengths, dim=2)):
        before = None if continues is None else continues[i]
        k, v = keys[i], values[i]
        if before is not None:
            k, v = torch.cat([keys[before], k], dim=2), torch.cat([values[before], v], dim=2)
        outputs.append(_attend(q, k, v, scaling, dropout, sliding_window, softcap, shown[i]))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    shown: Tensor | None,
) -> Tensor:
    """Causal attention of the last tokens of a row to all of it; the kernel where it applies, the formula for
    soft-capped logits (Gemma 2).
    """
    length, earlier = key.shape[2], key.shape[2] - query.shape[2]
    outside = window is not None and length > window
    plain = softcap is None and not outside and shown is None
    if plain and is_short(key) and dropout == 0:
        return attend_short(query, key, value, scaling)
    if plain and not earlier:
        return scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
        )
    distance = torch.arange(length, device=query.device)
    distance = distance[earlier:, None] - distance[None, :]
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    if shown is not None:
        visible = visible & shown
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=visible, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~visible, float("-inf")).float().softmax(-1).to(query.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ value


def is_short(key: Tensor) -> bool:
    """Where plain matrix products beat torch's attention kernel: half precision on the CPU, few tokens."""
    half = key.dtype in (torch.bfloat16, torch.float16)
    return half and key.device.type == "cpu" and key.shape[2] <= SHORT_TOKENS


def attend_short(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention of the last tokens of a row to all of it: [1, H, L, D], [1, H_kv, M, D] -> [1, H, L, D].

    Heads that share keys are rows of one product. The scores [H, L, M] exist, and stay for the backward pass.
    """
    _, heads, length, width = query.shape
    shared, total = key.shape[1:3]
    rows = query[0].reshape(shared, heads // shared * length, width)
    scores = torch.bmm(rows, key[0].transpose(1, 2)).mul_(scaling or width**-0.5)
    later = later_keys(key.dtype)[total - length : total, :total]
    scores = scores.view(shared, heads // shared, length, total) + later
    weights = scores.view(shared, -1, total).softmax(-1)
    return torch.bmm(weights, value[0]).view(1, heads, length, width)


@cache
def later_keys(dtype: torch.dtype) -> Tensor:
    """[SHORT_TOKENS, SHORT_TOKENS]: -inf where the key comes after the query, else 0."""
    return torch.full((SHORT_TOKENS, SHORT_TOKENS), float("-inf"), dtype=dtype).triu_(1)


def no_mask(*_: Any, **__: Any) -> None:
    """Segments need no mask tensor."""


AttentionInterface.register(SEGMENTS, segment_attention)
AttentionMaskInterface.register(SEGMENTS, no_mask)


def hidden_states(body: Any, batch: TrainBatch, at: Tensor, *, packing: bool) -> Tensor:
    """Last hidden state of the tokens `at`, i64 [n]: [n, hidden]. `body` is a transformer without its head.

    Without `packing` rows are padded to one length, for comparison.
    """
    lengths = batch.row_starts.diff().tolist()
    if packing:
        implementation = body.config._attn_implementation
        if implementation == SEGMENTS:
            if (stretches := lay_out(batch)) is not None:
                output = body(
                    input_ids=batch.input_ids[stretches.tokens][None],
                    position_ids=batch.position_ids[stretches.tokens][None],
                    use_cache=False,
                    row_lengths=stretches.lengths,
                    continues=stretches.continues,
                )
                return output.last_hidden_state[0][stretches.places[at]]
            segments: dict[str, Any] = {"row_lengths": lengths}
            if batch.hidden is not None:
                segments["hidden"] = batch.hidden
        elif batch.hidden is not None:
            raise LearnerError(
                f"learner.attention = {implementation!r} cannot hide tokens; use segments, or leave out "
                "algorithm.expert_loss.input_hook.hide_from_attention"
            )
        else:
            starts = batch.row_starts.to(torch.int32)
            longest = max(lengths)
            segments = {
                "cu_seq_lens_q": starts,
                "cu_seq_lens_k": starts,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        output = body(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            **segments,
        )
        return output.last_hidden_state[0][at]
    rows = batch.input_ids.split(lengths)
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    columns = torch.arange(padded.shape[1], device=padded.device)
    mask = columns[None] < batch.row_starts.diff()[:, None]
    visible = mask
    if batch.hidden is not None:
        hidden = torch.nn.utils.rnn.pad_sequence(
            list(batch.hidden.split(lengths)), batch_first=True
        )
        visible = mask & ~hidden
    output = body(
        input_ids=padded,
        attention_mask=visible.long(),
        position_ids=columns[None].expand_as(padded),
        use_cache=False,
    )
    return output.last_hidden_state[mask][at]
