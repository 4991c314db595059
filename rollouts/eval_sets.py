"""Data sets to evaluate on beside the held-out prompts: their problems are never trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from ..engine.errors import ConfigError, DataError
from .config import DrawSection, EvalSet
from .mixture import ReadPart, placed
from .order import derive_key
from .records import Record, Records
from .split import pick, problem_key


def add_eval_sets(records: Records, config: DrawSection, read_part: ReadPart) -> Records:
    """The records, every row of the evaluation sets among the held-out ones, and no training problem equal to one.

    Raises what reading a set raises, with its place; ConfigError where a set has a part's name; DataError where
    nothing to train on is left.
    """
    held: list[Record] = []
    bad, rewards = [*records.bad], set(records.rewards)
    for name, section in config.eval_sets.items():
        if name in {part.name for part in records.parts}:
            raise ConfigError.at(
                f"data.eval_sets.{name}", ..., "a part of the mixture has this name; choose another"
            )
        seed = int.from_bytes(derive_key(config.seed, f"eval_sets/{name}")[:4], "little")
        with placed(f"data.eval_sets.{name}.data"):
            rows = read_part(section.data, 0, seed)
        held += name_rows(name, section, rows.train)
        bad += rows.bad
        rewards |= rows.rewards
        if section.reward is not None:
            rewards.add(section.reward)
    train, copies, counts = without(records, {problem_key(record) for record in held})
    return replace(
        records,
        train=train,
        held_out=[*records.held_out, *held],
        copies=[*records.copies, *copies],
        parts=tuple(replace(p, num_train=n) for p, n in zip(records.parts, counts, strict=True)),
        bad=tuple(bad),
        rewards=frozenset(rewards),
    )


def name_rows(name: str, section: EvalSet, rows: Sequence[Record]) -> list[Record]:
    return [
        replace(
            record,
            prompt_id=f"{name}/{record.prompt_id}",
            reward=record.reward or section.reward,
            part=name,
        )
        for record in rows
    ]


def without(
    records: Records, problems: set[int]
) -> tuple[Sequence[Record], Sequence[Record], list[int]]:
    """Training records with other problems, those with these, and how many each part keeps."""
    train = records.train
    equal = np.fromiter((problem_key(r) in problems for r in train), bool, len(train))
    if equal.all():
        raise DataError("all training problems equal problems of data.eval_sets; remove the set")
    ends = np.cumsum([0, *(part.num_train for part in records.parts)])
    counts = [int((~equal[a:b]).sum()) for a, b in pairwise(ends.tolist())]
    for part, count in zip(records.parts, counts, strict=True):
        if not count:
            raise DataError(
                f"part {part.name!r} of the mixture: all of its training problems equal problems of data.eval_sets; "
                "remove the part or the set"
            )
    return pick(train, np.flatnonzero(~equal)), pick(train, np.flatnonzero(equal)), counts
