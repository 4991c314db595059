"""What a run writes down of each step, in steps.jsonl: who took part, what was computed, which weights came of it.

Every prompt that was drawn has an outcome: `trained` (in an optimizer step that was applied), `queued` (the algorithm
keeps it for a later step) or `dropped: REASON`. Two runs took the same step when their records are equal.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import CheckpointError
from .types import Prompt, RolloutGroup, UpdateReport

STEPS_FILE = "steps.jsonl"
QUEUED = "buffered"
"""What an algorithm calls a prompt that waits for a later step (ExpertLedger.unused)."""


@dataclass(frozen=True)
class StepRecord:
    step: int
    """Completed loop steps, this one included."""
    prompts: tuple[tuple[str, str], ...]
    """(prompt id, outcome) of the training stream, in the order they were drawn."""
    experts: tuple[tuple[str, str], ...]
    """As `prompts`, of the expert stream."""
    updates: tuple[tuple[str, float | None, float], ...]
    """(loss name, loss, gradient norm) of each optimizer step; the loss is null where it was not finite."""
    weights: str
    """Digest of the weights after it (RunState.weights)."""

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> StepRecord:
        """Raises ValueError where a crash tore it."""
        try:
            raw = json.loads(line)
            lists = {
                name: tuple(map(tuple, raw[name])) for name in ("prompts", "experts", "updates")
            }
            return cls(step=raw["step"], weights=raw["weights"], **lists)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a step record: {line[:80]!r}") from error

    def differences(self, other: StepRecord) -> list[str]:
        """Sentences; empty where both took the same step."""
        found = []
        for name in ("prompts", "experts", "updates", "weights"):
            mine, its = getattr(self, name), getattr(other, name)
            # As text: NaN and inf are what they are, and -0.0 is not 0.0.
            if repr(mine) != repr(its):
                found.append(f"step {self.step}: {name} {first_difference(mine, its)}")
        return found


def first_difference(mine: Sequence[object], its: Sequence[object]) -> str:
    if isinstance(mine, str):
        return f"{mine} was {its}"
    for i, (one, other) in enumerate(zip(mine, its, strict=False)):
        if repr(one) != repr(other):
            return f"{i}: {one} was {other}"
    return f"are {len(mine)}, were {len(its)}"


def read_records(folder: Path) -> list[StepRecord]:
    """Of a run folder, oldest first; a line torn by a crash ends them. Raises CheckpointError where there are none."""
    path = folder / STEPS_FILE
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(StepRecord.from_line(line))
        except ValueError:
            break
    if not found:
        raise CheckpointError(
            f"{path}: no step of this run is recorded, so there is none to repeat"
        )
    return found


def account(
    drawn: Sequence[Prompt],
    repeated: Sequence[str],
    groups: Sequence[RolloutGroup],
    reports: Sequence[UpdateReport],
    reasons: Mapping[str, str],
) -> tuple[tuple[str, str], ...]:
    """(prompt id, outcome) of every prompt drawn; `reasons`: what the algorithm itself says of those it left out."""
    trained = {name for report in reports if report.applied for name in report.prompts}
    skipped = {name for report in reports if not report.applied for name in report.prompts}
    of: dict[str, list[RolloutGroup]] = {}
    for group in groups:
        of.setdefault(group.prompt.prompt_id, []).append(group)

    def outcome(name: str) -> str:
        if name in trained:
            return "trained"
        if name in skipped:
            return "dropped: not_finite"
        if reasons.get(name) == QUEUED:
            return "queued"
        return f"dropped: {reasons.get(name) or why_left_out(of.get(name, []))}"

    found = [(prompt.prompt_id, outcome(prompt.prompt_id)) for prompt in drawn]
    return (*found, *((name, "dropped: repeated_in_step") for name in repeated))


def why_left_out(groups: Sequence[RolloutGroup]) -> str:
    rewards = [reward for group in groups for reward in group.rewards]
    if not groups:
        return "not_planned"
    if not rewards:
        return "unknown_score"
    return "uniform_rewards" if len(set(rewards)) == 1 else "left_out"


def count_outcomes(outcomes: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Metrics prompts/*: those drawn, and what became of them."""
    counts = Counter(outcome.replace(": ", "/") for _, outcome in outcomes)
    found = {f"prompts/{outcome}": float(n) for outcome, n in sorted(counts.items())}
    return {"prompts/drawn": float(len(outcomes)), **found}
