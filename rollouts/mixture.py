"""Several data sets as one: ids name their part, and no part trains what another one holds out."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import overload

import numpy as np

from ..engine.errors import ConfigError, DataError, HubError, Problem
from .config import MixtureData, MixturePart
from .order import derive_key
from .records import Part, Record, Records
from .split import RecordView, pick, problem_key

ReadPart = Callable[..., Records]
"""(rows section, num_eval, seed) -> its records."""


class PartRecords(Sequence[Record]):
    """The records of all parts, one part after the other, named and rewarded as the mixture says."""

    def __init__(self, parts: Sequence[tuple[MixturePart, Sequence[Record]]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(records) for _, records in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return RecordView(self.__getitem__, np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect_right(self._ends, index)
        part, records = self._parts[number]
        record = records[index - self._ends[number] + len(records)]
        return replace(
            record,
            prompt_id=f"{part.label}/{record.prompt_id}",
            reward=record.reward or part.reward,
            part=part.label,
        )


def mix(config: MixtureData, num_eval: int, read_part: ReadPart) -> Records:
    """Read every part, share out the held-out prompts by weight, and put all together."""
    shares = apportion(num_eval, [part.weight for part in config.parts])
    found = [_read(config, number, share, read_part) for number, share in enumerate(shares)]
    train, copies = _without_held_out(config.parts, found) if num_eval else (
        [records.train for records in found],
        [records.copies for records in found],
    )  # fmt: skip
    parts = []
    for part, records in zip(config.parts, train, strict=True):
        if not len(records):
            raise DataError(
                f"part {part.label!r} of the mixture: all of its training problems equal held-out ones of the parts; "
                "remove it, or lower eval.num_prompts"
            )
        parts.append(Part(part.label, part.weight, len(records)))
    named = [part.reward for part in config.parts if part.reward is not None]
    return Records(
        train=PartRecords(list(zip(config.parts, train, strict=True))),
        held_out=PartRecords([(p, r.held_out) for p, r in zip(config.parts, found, strict=True)]),
        copies=PartRecords(list(zip(config.parts, copies, strict=True))),
        parts=tuple(parts),
        bad=tuple(bad for records in found for bad in records.bad),
        rewards=frozenset(named).union(*(records.rewards for records in found)),
    )


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `total`, by largest remainder.

    >>> apportion(10, [0.7, 0.2, 0.2])
    [6, 2, 2]
    """
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _read(config: MixtureData, number: int, num_eval: int, read_part: ReadPart) -> Records:
    """One part."""
    part = config.parts[number]
    # Two parts of one generator, or of one file, must not draw the same rows.
    seed = int.from_bytes(derive_key(config.seed, part.label)[:4], "little")
    with placed(f"data.parts.{number}.data"):
        return read_part(part.data, num_eval, seed)


@contextmanager
def placed(place: str) -> Iterator[None]:
    """What is wrong with a data section is reported at its place in the recipe."""
    try:
        yield
    except ConfigError as error:
        kind = HubError if isinstance(error, HubError) else ConfigError
        raise kind(
            [
                Problem(place + p.path.removeprefix("data"), p.value, p.message)
                for p in error.problems
            ]
        ) from error


def _without_held_out(
    parts: Sequence[MixturePart], found: Sequence[Records]
) -> tuple[list[Sequence[Record]], list[Sequence[Record]]]:
    """Training records and left out copies of each part, other parts' held-out problems regarded too."""
    held = {problem_key(record) for records in found for record in records.held_out}
    train, copies = [], []
    for records in found:
        equal = np.fromiter(
            (problem_key(r) in held for r in records.train), bool, len(records.train)
        )
        more = [records.train[int(i)] for i in np.flatnonzero(equal)]
        train.append(pick(records.train, np.flatnonzero(~equal)))
        copies.append([*records.copies, *more])
    return train, copies
