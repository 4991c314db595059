"""Golden cases of pairwise expert losses and input hooks: columns of their rows, and their traces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..algorithms.expert_pairs import DiscriminativeFt, Pairs
from ..algorithms.input_hooks import MaskedThought, Qfft, with_context
from ..algorithms.rows import make_row
from ..engine.types import Prompt
from .golden_expert import CaseError

Case = Mapping[str, Any]
Trace = Callable[[Any, Sequence[Case]], list[dict[str, Any]]]


def normalizers(rows: Sequence[Case]) -> dict[str, float]:
    """What the run would remember of the prompts of paired rows. Raises CaseError for a group with two chosen rows."""
    chosen = [row for row in rows if row.get("pair") == "chosen"]
    groups = [row["group"] for row in chosen]
    twice = sorted(group for group in set(groups) if groups.count(group) > 1)
    if twice:
        raise CaseError(f"group {twice[0]!r} has {groups.count(twice[0])} chosen rows; keep one")
    visited = [row for row in chosen if row.get("log_normalizer") is not None]
    return {row["group"]: row["log_normalizer"] for row in visited}


def trace_discriminative_ft(algorithm: Any, entries: Sequence[Case]) -> list[dict[str, Any]]:
    """One prompt's visit an entry, from a fresh memory: its new normalizer and the weights of its rejected rows."""
    loss: DiscriminativeFt = algorithm.config.expert_loss
    memory: dict[str, float] = {}
    outputs = []
    for entry in entries:
        scores = torch.tensor(entry["rejected_scores"], dtype=torch.float64)
        ref = entry.get("rejected_ref_scores")
        if ref is None and not loss.reference_free:
            raise CaseError("discriminative_ft needs rejected_ref_scores, or reference_free")
        if ref is not None and len(ref) != len(entry["rejected_scores"]):
            raise CaseError(f"rejected_ref_scores = {ref}: one for each of rejected_scores")
        ref = None if loss.reference_free else torch.tensor(ref, dtype=torch.float64)
        # Row 0 is the chosen one.
        pairs = Pairs(torch.zeros(len(scores)).long(), torch.arange(1, len(scores) + 1))
        stored = torch.full((len(scores) + 1,), memory.get(entry["group"], float("nan"))).double()
        ratios = loss.ratios(scores, ref)
        updated = loss.normalizers(stored, ratios, pairs)
        coefs = loss.rejected_coefs(updated, ratios, pairs)
        memory[entry["group"]] = updated[0].item()
        outputs.append({"log_normalizer": updated[0].item(), "rejected_coefs": coefs.tolist()})
    return outputs


def trace_masked_thought(algorithm: Any, entries: Sequence[Case]) -> list[dict[str, Any]]:
    """The response as the model reads it."""
    hook: MaskedThought = algorithm.config.expert_loss.input_hook
    outputs = []
    for entry in entries:
        ids, step = np.asarray(entry["response_ids"], dtype=np.int64), entry.get("step") or 0
        weights = np.asarray(entry.get("token_weights") or [1.0] * len(ids))
        masked = hook.masked(weights != 0, np.asarray(entry["uniform_draws"]), step)
        random_ids = None
        if hook.replacement == "random_token":
            if entry.get("random_token_ids") is None:
                raise CaseError("masked_thought with random_token needs random_token_ids")
            random_ids = np.asarray(entry["random_token_ids"])
        output = {
            **hook.coefs(step),
            "input_ids": hook.replaced(ids, masked, random_ids).tolist(),
            "attention_mask": (~masked if hook.hide_from_attention else masked | True).astype(int),
        }
        outputs.append({**output, "attention_mask": output["attention_mask"].tolist()})
    return outputs


def trace_qfft(algorithm: Any, entries: Sequence[Case]) -> list[dict[str, Any]]:
    """The whole row, with 0 for every token that is not trained."""
    hook: Qfft = algorithm.config.expert_loss.input_hook
    outputs = []
    for entry in entries:
        prompt = Prompt("", (), tuple(entry["prompt_ids"]))
        response = tuple(entry["response_ids"])
        row = make_row(prompt, response, prefix_len=len(response))
        row.weights[len(prompt.token_ids) :] = entry.get("token_weights") or [1.0] * len(response)
        row = with_context(
            row, len(prompt.token_ids), hook.new_context(tuple(entry["empty_prompt_ids"]))
        )
        weights = np.where(row.source == 0, 0.0, row.weights)
        outputs.append({"input_ids": row.token_ids.tolist(), "token_weights": weights.tolist()})
    return outputs


def input_trace(algorithm: Any) -> Trace | None:
    """The tracer of the case's input hook or pairwise loss; None where it has neither."""
    loss = algorithm.config.expert_loss
    if isinstance(loss.input_hook, MaskedThought):
        return trace_masked_thought
    if isinstance(loss.input_hook, Qfft):
        return trace_qfft
    return trace_discriminative_ft if isinstance(loss, DiscriminativeFt) else None
