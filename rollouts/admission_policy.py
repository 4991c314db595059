"""The recipe's `data.admission`: which findings about demonstrations refuse a run, drop something, or are counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic import Field

from ..engine.config import Section

Key = tuple[str, int]
"""Prompt id, and place among the row's demonstrations."""
Action = Literal["refuse", "drop", "keep"]
"""refuse: the run does not start. drop: the demonstration (or row) is left out and quarantined. keep: it is counted."""


class AdmissionConfig(Section):
    """What is done with a demonstration, or a row, that the admission finds fault with (docs/data-admission.md)."""

    wrong: Action | None = None
    """The verifier's reward is below 1. null: drop, but keep where the expert loss reads demonstrations' rewards, or
    where reward.gold_samples = 0 says that the reward is no verifier."""
    unknown: Action = "keep"
    """The verifier could not tell."""
    empty: Action = "drop"
    """Only invisible characters; one of nothing but white space is refused when the row is read."""
    no_end: Action = "drop"
    """Cut off: something is opened and never closed, or metadata.finish_reason says so."""
    control_token: Literal["refuse", "drop"] = "drop"
    """Holds a control token of the tokenizer."""
    foreign_template: Action = "refuse"
    """Holds the markup of a chat template; or the row's prompt does."""
    fully_masked: Action = "drop"
    """No token with a weight is left of it within rollouts.max_response_length."""
    too_long: Action = "keep"
    """Longer than rollouts.max_response_length: it trains without what lies beyond, its end included."""
    duplicate: Action = "keep"
    """The prompt's own demonstration again, or a text of 13 words or more that another prompt has too."""
    duplicate_prompt: Action = "keep"
    """A row whose prompt an earlier row has."""
    eval_copy: Action = "drop"
    """A row of whose prompt every 13 words in a row (all of them where it has fewer) are in a held-out prompt."""
    eval_overlap: Action = "keep"
    """A row of whose prompt some are."""
    max_dropped_fraction: float = Field(default=0.5, ge=0, le=1)
    """Largest share of the demonstrations that may be dropped, and of the graded ones that may be dropped as wrong;
    above it the run does not start."""
    max_graded: int = Field(default=2000, ge=0)
    """Demonstrations that the start of a run grades, of prompts drawn by data.seed; `plait check data` grades all."""


class Reason(StrEnum):
    """In the order in which a dropped demonstration is counted."""

    EVAL_COPY = "eval_copy"
    FOREIGN_TEMPLATE = "foreign_template"
    DUPLICATE_PROMPT = "duplicate_prompt"
    EVAL_OVERLAP = "eval_overlap"
    CONTROL_TOKEN = "control_token"
    EMPTY = "empty"
    FULLY_MASKED = "fully_masked"
    NO_END = "no_end"
    TOO_LONG = "too_long"
    WRONG = "wrong"
    UNKNOWN = "unknown"
    DUPLICATE = "duplicate"
    UNDEMONSTRATED = "undemonstrated"
    """A row that lost all its demonstrations, where the algorithm trains one of every prompt."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault of one demonstration, or of a whole row where `place` is None."""

    prompt_id: str
    place: int | None
    reason: Reason
    detail: str = ""

    @property
    def where(self) -> str:
        return "row" if self.place is None else f"demonstration {self.place}"

    def __str__(self) -> str:
        return f"{self.prompt_id}, {self.where}: {self.detail}"


@dataclass(frozen=True)
class Decision:
    """What the policy makes of the findings."""

    dropped: Mapping[Key, Reason]
    """Demonstrations that do not train; their prompts may."""
    left_out: Mapping[str, Reason]
    """Prompts that leave the training set with all that is theirs."""
    refused: tuple[Finding, ...]
    """Why the run may not start."""


def decide(
    findings: Sequence[Finding],
    places: Mapping[str, Sequence[int]],
    actions: Mapping[Reason, Action],
    *,
    every_prompt_demonstrated: bool = False,
) -> Decision:
    """`places`: those of all demonstrations, by prompt id.

    With `every_prompt_demonstrated`, rows that lose all of theirs leave the training set.
    """
    left_out: dict[str, Reason] = {}
    dropped: dict[Key, Reason] = {}
    order = {reason: i for i, reason in enumerate(Reason)}
    for finding in sorted(findings, key=lambda f: order[f.reason]):
        if actions[finding.reason] != "drop":
            continue
        if finding.place is None:
            left_out.setdefault(finding.prompt_id, finding.reason)
        else:
            dropped.setdefault((finding.prompt_id, finding.place), finding.reason)
    for prompt_id, reason in left_out.items():
        dropped |= dict.fromkeys(((prompt_id, i) for i in places.get(prompt_id, ())), reason)
    if every_prompt_demonstrated:
        for prompt_id in dict.fromkeys(prompt_id for prompt_id, _ in dropped):
            if all((prompt_id, i) in dropped for i in places[prompt_id]):
                left_out.setdefault(prompt_id, Reason.UNDEMONSTRATED)
    refused = tuple(f for f in findings if actions[f.reason] == "refuse")
    return Decision(dropped, left_out, refused)


def choose_actions(policy: AdmissionConfig, *, keep_wrong: bool = False) -> dict[Reason, Action]:
    """What is done about each reason; `keep_wrong`: where the policy leaves open what becomes of wrong ones."""
    actions: dict[Reason, Action] = {Reason.UNDEMONSTRATED: "drop"}
    for reason in Reason:
        if reason != Reason.UNDEMONSTRATED:
            actions[reason] = getattr(policy, reason.value)
    if policy.wrong is None:
        actions[Reason.WRONG] = "keep" if keep_wrong else "drop"
    return actions
