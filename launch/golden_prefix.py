"""Golden cases of uft, prefix_rft, relift, sasr and one_token_rollout: columns of their rows, and their traces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..algorithms import one_token_rollout, prefix_rft, relift, sasr, uft
from ..algorithms.rounds import all_failed
from ..engine.token_samples import draw, expected_sums, sampled_sums
from ..engine.types import Prompt, TokenSamples, TrainBatch, UpdateReport
from .golden_expert import CaseError

Case = Mapping[str, Any]


def recorded_entropy(rows: Sequence[Case], batch: TrainBatch) -> Tensor:
    """float64 [T]: `old_entropy` of each row; where a row has none, the entropy of its logits."""
    values: list[float] = []
    for row in rows:
        recorded = row.get("old_entropy")
        if recorded is None and row.get("response_ids"):
            logprobs = torch.tensor(row["logits"], dtype=torch.float64).log_softmax(-1)
            recorded = (-(logprobs.exp() * logprobs).sum(-1)).tolist()
        values += [0.0, *(recorded or [])]
    assert len(values) == batch.num_tokens
    return torch.tensor(values, dtype=torch.float64)


def token_samples(
    logits: Sequence[Tensor], rows: Sequence[Case], batch: TrainBatch, algorithm: Any
) -> TokenSamples:
    """What the LM head would return for the rows' given samples, or in the exact form: float64 [T]."""
    sampling = algorithm.token_sampling
    columns: list[list[Tensor]] = [[], [], []]
    for leaf, row in zip(logits, rows, strict=True):
        targets = torch.tensor(row.get("response_ids") or [], dtype=torch.long)
        sums: tuple[Tensor, ...] = (leaf.new_zeros(0),) * 3
        if len(targets) and sampling.exact:
            sums = expected_sums(leaf, targets, sampling)
        elif len(targets):
            if row.get("samples") is None:
                raise CaseError(
                    "one_token_rollout needs `samples` on every row, or exact_expectation"
                )
            sums = sampled_sums(leaf, targets, torch.tensor(row["samples"]), sampling)
        for column, values in zip(columns, sums, strict=True):
            column += [leaf.new_zeros(1), values]
    return TokenSamples(*(torch.cat(column).where(batch.trained, 0.0) for column in columns))


def trace_uft(algorithm: uft.Uft, entry: Case) -> dict[str, Any]:
    """Hint of one solution, all of whose pieces may be shown."""
    pieces, config = entry["piece_lengths"], algorithm.config
    hint = uft.choose_hint(entry["step"], pieces, entry["uniforms"], config)
    return {
        "hint_probability": uft.hint_probability(entry["step"], config),
        "bucket": hint.bucket,
        "pieces_shown": hint.pieces_shown,
        "prefix_len": hint.prefix_len,
    }


def trace_prefix_rft(algorithm: prefix_rft.PrefixRft, entry: Case) -> dict[str, Any]:
    step, config = entry["step"], algorithm.config
    ratio = prefix_rft.prefix_ratio(step, entry["uniform"], config)
    return {
        "prefix_ratio_low": prefix_rft.prefix_ratio_low(step, config),
        "prefix_ratio": ratio,
        "prefix_len": prefix_rft.prefix_length(ratio, entry["demo_length"], config),
    }


def trace_relift(algorithm: relift.Relift, entry: Case) -> dict[str, Any]:
    """One step of the buffer; every failed prompt is taken to have a demonstration."""
    threshold = algorithm.config.failure_threshold
    failed = [
        Prompt(name, (), ()) for name, rewards in entry["rewards"] if all_failed(rewards, threshold)
    ]
    batch = algorithm.take_batch(failed)
    return {
        "expert_batch": None if batch is None else [prompt.prompt_id for prompt in batch],
        "buffer": [prompt.prompt_id for prompt in algorithm.buffer],
    }


def trace_sasr(algorithm: sasr.Sasr, entry: Case) -> dict[str, Any]:
    """One step of the gate; entry k of a case is step k."""
    step = algorithm.num_sft + algorithm.num_rl
    kind = algorithm.choose(step, lambda: entry["uniform"])
    if kind == "sft":
        algorithm.observe(UpdateReport("sft", entry["sft_grad_norm"], {}, 0.0))
    return {
        "kind": kind,
        "sft_probability": algorithm.sft_probability,
        "warmup_norm": algorithm.warmup_norm,
        "last_norm": algorithm.last_norm,
    }


def trace_one_token_rollout(
    algorithm: one_token_rollout.OneTokenRollout, entry: Case
) -> dict[str, Any]:
    logits = torch.tensor([entry["logits"]], dtype=torch.float64)
    uniforms = torch.tensor([entry["uniforms"]], dtype=torch.float64)
    samples = draw(logits, uniforms, algorithm.config.sampling_temperature)
    return {"samples": samples[0].tolist()}


PREFIX_TRACES: dict[str, Callable[[Any, Case], dict[str, Any]]] = {
    "uft": trace_uft,
    "prefix_rft": trace_prefix_rft,
    "relift": trace_relift,
    "sasr": trace_sasr,
    "one_token_rollout": trace_one_token_rollout,
}
