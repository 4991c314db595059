"""A shuffled order that is a function, not a state: position -> row, at any position, in O(1).

Each (seed, stream, epoch) keys one permutation of `range(n)`: a Feistel network over a grid of
a x b >= n cells (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"), walked until it
lands below n. Nothing is stored, so resuming a run needs the position alone and a data set of any
size is shuffled without holding its indices.
"""

from __future__ import annotations

import math
from hashlib import blake2b

import numpy as np

ROUNDS = 8


def derive_key(*parts: int | str) -> bytes:
    """16 bytes that depend on every part: `derive_key(seed, "experts", epoch)`."""
    return blake2b("/".join(map(str, parts)).encode(), digest_size=16).digest()


class Permutation:
    """A keyed bijection of `range(n)`.

    >>> shuffle = Permutation(5, derive_key(0, "prompts", 0))
    >>> sorted(shuffle(i) for i in range(5))
    [0, 1, 2, 3, 4]
    """

    def __init__(self, n: int, key: bytes) -> None:
        if n < 1:
            raise ValueError(f"n = {n}: a permutation needs at least one element")
        self.n = n
        self._key = key
        self._rows = math.isqrt(n - 1) + 1
        self._columns = -(-n // self._rows)

    def __call__(self, index: int) -> int:
        if not 0 <= index < self.n:
            raise IndexError(f"index {index} is outside range({self.n})")
        cell = self._encrypt(index)
        # The grid has a few cells more than n; following the cycle from one of them comes back below n
        # and keeps the map a bijection.
        while cell >= self.n:
            cell = self._encrypt(cell)
        return cell

    def _encrypt(self, cell: int) -> int:
        row, column = divmod(cell, self._columns)
        for round_ in range(ROUNDS):
            if round_ % 2:
                column = (column + self._hash(round_, row)) % self._columns
            else:
                row = (row + self._hash(round_, column)) % self._rows
        return row * self._columns + column

    def _hash(self, round_: int, half: int) -> int:
        message = round_.to_bytes(1, "little") + half.to_bytes(8, "little")
        return int.from_bytes(blake2b(message, digest_size=8, key=self._key).digest(), "little")


class ShuffledStream:
    """Endless epochs over n rows; `position` counts rows since the start and is the whole state.

    The rows of one `take` are distinct, because a step names its groups by prompt: an epoch's tail
    that is shorter than the take is skipped (it is a different one in each epoch).
    """

    def __init__(self, n: int, *, seed: int, name: str) -> None:
        self.n = n
        self.position = 0
        self._seed = seed
        self._name = name
        self._epoch: tuple[int, Permutation] | None = None

    @property
    def epoch(self) -> int:
        return self.position // self.n

    def row_at(self, position: int) -> int:
        epoch, offset = divmod(position, self.n)
        if self._epoch is None or self._epoch[0] != epoch:
            key = derive_key(self._seed, self._name, epoch)
            self._epoch = (epoch, Permutation(self.n, key))
        return self._epoch[1](offset)

    def take(self, count: int, allowed: np.ndarray | None = None) -> list[int]:
        """The next `count` rows, all different, passing over those that are not `allowed` (bool [n]).

        Raises ValueError where count is more than there are.
        """
        there = self.n if allowed is None else int(allowed.sum())
        if not 0 <= count <= there:
            raise ValueError(f"cannot take {count} different rows of {there}")
        if allowed is None and count > self.n - self.position % self.n:
            self.position += self.n - self.position % self.n
        rows: list[int] = []
        while len(rows) < count:
            row = self.row_at(self.position)
            self.position += 1
            if allowed is None or allowed[row]:
                rows.append(row)
            if len(rows) < count and self.position % self.n == 0:
                rows.clear()  # the epoch's tail
        return rows
