"""Traces of data selection: decisions of a rule on given numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..algorithms.data_selection import Lobass, QTuning, RolloutFilter, SelfResponse, Uds
from ..engine.row_sketch import gram_matrix, nuclear_norm

Case = Mapping[str, Any]


def trace_q_tuning(rule: QTuning, entry: Case, memory: dict[str, Any]) -> dict[str, Any]:
    whole, pruned, added = rule.rows(entry["perplexity"], entry["entropy"])
    tokens = [[int(kept) for kept in rule.tokens(row)] for row in entry.get("token_nll") or []]
    return {
        "keep_whole": whole,
        "keep_pruned": pruned,
        "keep_added": added,
        "token_keep": tokens,
    }


def trace_uds(rule: Uds, entry: Case, memory: dict[str, Any]) -> dict[str, Any]:
    logits = [torch.tensor(row, dtype=torch.float64) for row in entry["logits"]]
    norms = [float(nuclear_norm(gram_matrix(row))) for row in logits]
    scores, kept = rule.rank(norms, entry["sketches"], memory)
    return {"scores": scores, "kept_rows": kept}


def trace_lobass(rule: Lobass, entry: Case, memory: dict[str, Any]) -> dict[str, Any]:
    scores, kept = rule.rank(entry["base_loss"], entry["ref_loss"])
    return {"scores": scores, "kept_rows": kept}


def trace_self_response(rule: SelfResponse, entry: Case, memory: dict[str, Any]) -> dict[str, Any]:
    candidate = rule.accepted(entry["candidate_rewards"])
    return {"target": "gold" if candidate is None else "self", "candidate": candidate}


def trace_rollout_filter(
    rule: RolloutFilter, entry: Case, memory: dict[str, Any]
) -> dict[str, Any]:
    return {"keep": rule.keeps(entry["rewards"])}


TRACES: Mapping[str, Callable[[Any, Case, dict[str, Any]], dict[str, Any]]] = {
    "q_tuning": trace_q_tuning,
    "uds": trace_uds,
    "lobass": trace_lobass,
    "self_response": trace_self_response,
    "rollout_filter": trace_rollout_filter,
}


def trace_selection(algorithm: Any, entries: Sequence[Case]) -> list[dict[str, Any]]:
    """One decision an entry, from a fresh memory."""
    rule = algorithm.config.data_selection
    memory: dict[str, Any] = {}
    return [TRACES[rule.type](rule, entry, memory) for entry in entries]
