"""The expert ledger: what demonstrations did in a step, and what they pull at compared with rollouts.

Names are documented in docs/metrics.md. The same counting serves every method: a demonstration was used when an EXPERT
token of its prompt trains. Methods add what only they know (`Algorithm.ledger`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .probes import GradientComparison
from .types import Prompt, RolloutGroup, Sample, Source, Update

if TYPE_CHECKING:
    from .contracts import Algorithm

Probes = Mapping[str, tuple[Update, Source]]


@dataclass(frozen=True, slots=True)
class ExpertLedger:
    """What only the algorithm knows about the expert's part in a step; the loop counts the rest from the rows."""

    expert_coef: float | None = None
    """Weight of the expert component in the loss; None where it has none of its own."""
    gate_rate: float | None = None
    """Share of the gate's decisions of this step that let the expert in."""
    buffer_size: int | None = None
    """Prompts kept for later steps."""
    used: frozenset[str] | None = None
    """prompt_ids whose demonstration took part, where rows do not show it: a hint is no trained token."""
    unused: Mapping[str, str] = field(default_factory=dict)
    """prompt_id -> why its demonstration did not train: solved, too_short, buffered, ..."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    """The same for prompts whose rows say otherwise: dropped later, or EXPERT tokens that are no demonstration."""


def uses_demonstrations(algorithm: Algorithm) -> bool:
    """True where some loss consumes demonstrations."""
    return any("demonstrations" in needs for needs in algorithm.needs.values())


def trains(sample: Sample, source: Source) -> bool:
    """True where the row has a trained token of `source`."""
    return bool(((sample.source == source) & (sample.weights != 0)).any())


def expert_ledger(
    algorithm: Algorithm,
    prompts: Sequence[Prompt],
    groups: Sequence[RolloutGroup],
    updates: Sequence[Update],
    step: int,
    max_tokens: int,
) -> dict[str, float]:
    """Use of the demonstrations of the step's prompts (those that were drawn later in the step too).

    The shares of used and unused ones, by reason, add up to 1. `demonstrations_cut`: share of the prompts whose first
    demonstration exceeds `max_tokens`, so it trains without its end token. Empty for a method without demonstrations.
    """
    if not uses_demonstrations(algorithm):
        return {}
    known = algorithm.ledger(updates, step)
    metrics: dict[str, float] = {}
    for name in ("expert_coef", "gate_rate", "buffer_size"):
        value = getattr(known, name)
        if value is not None:
            metrics[f"ledger/{name}"] = value
    everyone = {p.prompt_id: p for p in [*prompts, *(group.prompt for group in groups)]}
    rows = [sample for update in updates for sample in update.samples]
    used = known.used
    if used is None:
        used = {sample.group_id for sample in rows if trains(sample, Source.EXPERT)}
    used -= known.dropped.keys()
    scored = {group.prompt.prompt_id for group in groups if group.rewards}
    unscored = {group.prompt.prompt_id for group in groups} - scored
    counts = Counter(
        unused_reason(prompt, {**known.unused, **known.dropped}, unscored)
        for prompt in everyone.values()
        if prompt.prompt_id not in used
    )
    if everyone:
        metrics["ledger/demonstrations_used"] = len(used & everyone.keys()) / len(everyone)
        for reason, count in counts.items():
            metrics[f"ledger/demonstrations_unused/{reason}"] = count / len(everyone)
        first = [prompt.demonstrations[:1] for prompt in everyone.values()]
        cut = sum(len(d.token_ids) > max_tokens for demonstrations in first for d in demonstrations)
        metrics["ledger/demonstrations_cut"] = cut / len(everyone)
    if earlier := used - everyone.keys():
        metrics["ledger/demonstrations_of_earlier_steps"] = len(earlier)
    return metrics


def unused_reason(prompt: Prompt, known: Mapping[str, str], unscored: Iterable[str]) -> str:
    """no_demonstration, the algorithm's own reason, unknown_score (of every rollout or demonstration), not_planned."""
    if not prompt.demonstrations:
        return "no_demonstration"
    if prompt.prompt_id in known:
        return known[prompt.prompt_id]
    graded = [d.score for d in prompt.demonstrations if d.score is not None]
    no_verdict = bool(graded) and all(score.reward is None for score in graded)
    return "unknown_score" if no_verdict or prompt.prompt_id in unscored else "not_planned"


def split_by_source(algorithm: Algorithm, updates: Sequence[Update]) -> Probes:
    """For each update and source with a trained token: the part of its gradient that source accounts for.

    Updates of a critic alone have no part in it.
    """
    return {
        f"{source.name.lower()} of update {i}": (update, source)
        for i, update in enumerate(updates)
        if "new_values" not in algorithm.needs[update.loss]
        for source in (Source.EXPERT, Source.POLICY)
        if any(trains(sample, source) for sample in update.samples)
    }


def gradient_ledger(found: GradientComparison, split: Probes) -> dict[str, float]:
    """Norms of the expert's and the policy's gradient summed over the step's updates, share and cosine.

    Absent where a source trains nothing in this step; share and cosine also where they are undefined.
    """

    def dot(one: Source, other: Source) -> float:
        return sum(
            found.dot(a, b)
            for a, (_, source_of_a) in split.items()
            for b, (_, source_of_b) in split.items()
            if (source_of_a, source_of_b) == (one, other)
        )

    sources = {source for _, source in split.values()}
    norms = {source: max(dot(source, source), 0.0) ** 0.5 for source in sources}
    metrics = {f"ledger/{s.name.lower()}_gradient_norm": norm for s, norm in norms.items()}
    if len(norms) == 2 and sum(norms.values()) > 0:
        expert, policy = norms[Source.EXPERT], norms[Source.POLICY]
        metrics["ledger/expert_gradient_share"] = expert / (expert + policy)
        if expert * policy > 0:
            cosine = dot(Source.EXPERT, Source.POLICY) / (expert * policy)
            metrics["ledger/gradient_cosine"] = cosine
    return metrics
