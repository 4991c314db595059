"""Held-out problems: drawn by seed, and no training problem with the same text."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import overload

import numpy as np

from ..engine.errors import DataError
from .order import Permutation, derive_key
from .records import Record


class RecordView(Sequence[Record]):
    """Some of a source's records, each made when it is asked for: what is held of one is its number."""

    def __init__(self, read: Callable[[int], Record], numbers: np.ndarray) -> None:
        self._read = read
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> RecordView: ...

    def __getitem__(self, index: int | slice) -> Record | RecordView:
        if isinstance(index, slice):
            return RecordView(self._read, self._numbers[index])
        return self._read(int(self._numbers[index]))

    def __iter__(self) -> Iterator[Record]:
        return map(self._read, map(int, self._numbers))


def pick(records: Sequence[Record], which: np.ndarray) -> Sequence[Record]:
    """The records of these numbers."""
    return RecordView(records.__getitem__, which)


def problem_key(record: Record) -> int:
    """64 bits that are equal for problems whose text differs in case, white space or Unicode form only."""
    text = "\n".join(f"{message['role']}: {message['content']}" for message in record.messages)
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text_key(folded)


def text_key(text: str) -> int:
    """64 bits of a text: two of a million differ with a probability of 1 - 3e-8."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def draw_held_out(keys: np.ndarray, num_eval: int, seed: int, source: str) -> list[int]:
    """Numbers of `num_eval` records with different problems, of which keys are given.

    The draw depends on the seed and the number of records only.
    """
    if not num_eval:
        return []
    shuffle = Permutation(len(keys), derive_key(seed, "held_out"))
    held: dict[int, int] = {}
    for position in range(len(keys)):
        row = shuffle(position)
        held.setdefault(int(keys[row]), row)
        if len(held) == num_eval:
            break
    rows = list(held.values())
    if len(held) < num_eval or np.isin(keys, keys[rows]).all():
        raise DataError(
            f"{source}: {len(np.unique(keys))} different problems cannot give {num_eval} held-out ones "
            "and a training set: lower eval.num_prompts or add rows"
        )
    return rows
