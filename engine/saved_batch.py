"""One step's prompts, demonstrations and scored rollouts in a file: for the journal of a run, and for `plait ask`.

The file is JSON with the sha256 of its content; numbers come back to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter
from pydantic_core import PydanticSerializationError

from .errors import DataError
from .types import Demonstration, Prompt, Rollout, RolloutGroup, RolloutRequest, Score

HEAD, MIDDLE, TAIL = b'{"sha256":"', b'","batch":', b"}\n"
_START = len(HEAD) + 64 + len(MIDDLE)


@dataclass(frozen=True)
class SavedGroup:
    prompt_id: str
    rollouts: tuple[Rollout, ...]
    scores: tuple[Score, ...]
    asked: Prompt | None = None
    """What was rolled out, where a round asked in other words than the batch's prompt (with a hint in the text)."""


@dataclass(frozen=True)
class SavedRound:
    """What one round of rollouts asked for, and what came back."""

    requests: tuple[str, ...]
    """`request_key` of each request."""
    groups: tuple[SavedGroup, ...]

    def answer(self, requests: Sequence[RolloutRequest]) -> list[RolloutGroup] | None:
        """The groups of these requests; None where the round asked for something else."""
        if self.requests != tuple(map(request_key, requests)):
            return None
        asked: dict[str, Prompt] = {}
        for request in requests:
            asked.setdefault(request.prompt.prompt_id, request.prompt)
        return [RolloutGroup(asked[g.prompt_id], g.rollouts, g.scores) for g in self.groups]


@dataclass(frozen=True)
class SavedBatch:
    """What `assemble` was given, before any method made rows of it."""

    __pydantic_config__ = ConfigDict(ser_json_inf_nan="constants")

    step: int
    """Completed loop steps: what schedules depend on."""
    prompts: tuple[Prompt, ...]
    """Every prompt of the step, those of the expert stream and of later rounds included."""
    rounds: tuple[SavedRound, ...]
    policy_version: int = 0
    weights: str = ""
    """Digest of the weights that the rollouts were sampled from (RunState.weights)."""
    seed: int = 0
    """Of the run."""
    follows: str = ""
    """sha256 of the entry before, where the same process wrote or used it."""

    @property
    def groups(self) -> list[SavedGroup]:
        """Of all rounds, in order."""
        return [group for round_ in self.rounds for group in round_.groups]

    @property
    def rollout_groups(self) -> list[RolloutGroup]:
        of = {prompt.prompt_id: prompt for prompt in self.prompts}
        return [RolloutGroup(g.asked or of[g.prompt_id], g.rollouts, g.scores) for g in self.groups]

    def with_verdicts(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The same prompts, their demonstrations with the scores that the batch holds."""
        scores = {
            (prompt.prompt_id, i): demonstration.score
            for prompt in self.prompts
            for i, demonstration in enumerate(prompt.demonstrations)
        }

        def verdict(prompt: Prompt, i: int, demonstration: Demonstration) -> Demonstration:
            return replace(
                demonstration, score=scores.get((prompt.prompt_id, i), demonstration.score)
            )

        return [
            replace(
                prompt,
                demonstrations=tuple(
                    verdict(prompt, i, d) for i, d in enumerate(prompt.demonstrations)
                ),
            )
            for prompt in prompts
        ]


ADAPTER = TypeAdapter(SavedBatch)


def request_key(request: RolloutRequest) -> str:
    """Equal for equal requests: who is asked, in which words, after which prefix, how, and how often."""
    asked = (request.prompt.token_ids, request.prefix, request.sampling)
    words = hashlib.sha256(repr(asked).encode()).hexdigest()[:16]
    return f"{request.first_index}+{request.n} {words} {request.prompt.prompt_id}"


def save_rounds(
    prompts: Sequence[Prompt],
    rounds: Sequence[tuple[Sequence[RolloutRequest], Sequence[RolloutGroup]]],
) -> tuple[tuple[Prompt, ...], tuple[SavedRound, ...]]:
    """A step's prompts and rounds as SavedBatch holds them: each prompt once, however many groups it has."""
    everyone: dict[str, Prompt] = {}
    groups = [group for _, found in rounds for group in found]
    for prompt in [*prompts, *(group.prompt for group in groups)]:
        everyone.setdefault(prompt.prompt_id, prompt)

    def saved(group: RolloutGroup) -> SavedGroup:
        own_words = group.prompt == everyone[group.prompt.prompt_id]
        asked = None if own_words else group.prompt
        return SavedGroup(group.prompt.prompt_id, group.rollouts, group.scores, asked)

    packed = tuple(
        SavedRound(tuple(map(request_key, requests)), tuple(map(saved, found)))
        for requests, found in rounds
    )
    return tuple(everyone.values()), packed


def to_bytes(path: Path, batch: SavedBatch) -> bytes:
    """The content of `path`. Raises DataError where a prompt's metadata is not JSON."""
    try:
        content = ADAPTER.dump_json(batch)
    except PydanticSerializationError as error:
        raise DataError(
            f"{path}: a prompt's metadata cannot be written as JSON ({error}); keep plain data in it"
        ) from error
    return HEAD + hashlib.sha256(content).hexdigest().encode() + MIDDLE + content + TAIL


def read_batch(path: Path) -> SavedBatch:
    """Raises DataError naming the file and what is wrong with it."""
    try:
        batch = from_bytes(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a saved batch: {error}") from error
    unknown = {g.prompt_id for g in batch.groups} - {p.prompt_id for p in batch.prompts}
    if unknown:
        raise DataError(f"{path}: groups of prompts that it does not hold: {sorted(unknown)}")
    return batch


def from_bytes(data: bytes) -> SavedBatch:
    """Raises ValueError (pydantic's ValidationError is one) where anything is missing or was changed."""
    content = data[_START : -len(TAIL)]
    whole = data.startswith(HEAD) and data[_START - len(MIDDLE) : _START] == MIDDLE
    if not whole or not data.endswith(TAIL):
        raise ValueError("it is cut off, or something else")
    if digest_of(data) != hashlib.sha256(content).hexdigest():
        raise ValueError("its content does not have the sha256 that it names")
    return ADAPTER.validate_json(content)


def digest_of(data: bytes) -> str:
    """The sha256 that a saved batch names."""
    return data[len(HEAD) : len(HEAD) + 64].decode(errors="replace")
