"""One step's prompts, demonstrations and scored rollouts in a file, for questions asked later (`plait ask`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from .errors import DataError
from .types import Prompt, Rollout, RolloutGroup, Score


@dataclass(frozen=True)
class SavedGroup:
    prompt_id: str
    rollouts: tuple[Rollout, ...]
    scores: tuple[Score, ...]
    asked: Prompt | None = None
    """What was rolled out, where a round asked in other words than the batch's prompt (with a hint in the text)."""


@dataclass(frozen=True)
class SavedBatch:
    """What `assemble` was given, before any method made rows of it."""

    step: int
    """Completed loop steps: what schedules depend on."""
    prompts: tuple[Prompt, ...]
    """Every prompt of the step, those of the expert stream and of later rounds included."""
    groups: tuple[SavedGroup, ...]
    """Of all rounds, in order."""

    @property
    def rollout_groups(self) -> list[RolloutGroup]:
        of = {prompt.prompt_id: prompt for prompt in self.prompts}
        return [RolloutGroup(g.asked or of[g.prompt_id], g.rollouts, g.scores) for g in self.groups]


ADAPTER = TypeAdapter(SavedBatch)


def save_batch(
    path: Path, step: int, prompts: Sequence[Prompt], groups: Sequence[RolloutGroup]
) -> None:
    """Write JSON. Raises DataError where a prompt's metadata is not JSON."""
    everyone: dict[str, Prompt] = {}
    for prompt in [*prompts, *(group.prompt for group in groups)]:
        everyone.setdefault(prompt.prompt_id, prompt)
    saved = tuple(
        SavedGroup(
            group.prompt.prompt_id,
            group.rollouts,
            group.scores,
            None if group.prompt == everyone[group.prompt.prompt_id] else group.prompt,
        )
        for group in groups
    )
    batch = SavedBatch(step, tuple(everyone.values()), saved)
    try:
        content = ADAPTER.dump_json(batch)
    except PydanticSerializationError as error:
        raise DataError(
            f"{path}: a prompt's metadata cannot be written as JSON ({error}); set loop.save_batch_every = 0"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def read_batch(path: Path) -> SavedBatch:
    """Raises DataError naming the file and what is wrong with it."""
    try:
        batch = ADAPTER.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{path}: not a saved batch: {error}") from error
    unknown = {g.prompt_id for g in batch.groups} - {p.prompt_id for p in batch.prompts}
    if unknown:
        raise DataError(f"{path}: groups of prompts that it does not hold: {sorted(unknown)}")
    return batch
