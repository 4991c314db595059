"""Rows of a minibatch -> ranks -> micro-batches, by what they cost in tokens. Pure; no collectives, no model.

A row is never split. Rows that begin alike (shared_prefix.py) pay for those tokens once in a micro-batch, so they stay
together as far as the balance between ranks and the token budget allow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .errors import DataError
from .types import TrainBatch

BALANCED = 1.01
"""Tokens of the busiest rank over the mean, from where on nothing is moved."""
BLANK_TOKENS = 2
"""Cost of a micro-batch without rows (`batch.blank`)."""


@dataclass(frozen=True)
class Unit:
    """Rows that must be computed together."""

    rows: tuple[int, ...]
    own: int
    """Tokens, less the prefix."""
    prefix: int | None = None
    """Which shared prefix they begin with."""
    shared: int = 0
    """Its tokens."""

    @property
    def alone(self) -> int:
        return self.own + self.shared


@dataclass
class Load:
    """What one rank or one micro-batch has."""

    units: list[int] = field(default_factory=list)
    prefixes: Counter[int] = field(default_factory=Counter)
    tokens: int = 0

    def added(self, unit: Unit) -> int:
        """What it would cost more."""
        known = unit.prefix is not None and self.prefixes[unit.prefix] > 0
        return unit.own if known else unit.alone

    def freed(self, unit: Unit) -> int:
        """What it would cost less without this one of its units."""
        needed = unit.prefix is not None and self.prefixes[unit.prefix] > 1
        return unit.own if needed else unit.alone

    def add(self, number: int, unit: Unit) -> None:
        self.tokens += self.added(unit)
        self.units.append(number)
        if unit.prefix is not None:
            self.prefixes[unit.prefix] += 1

    def remove(self, number: int, unit: Unit) -> None:
        self.tokens -= self.freed(unit)
        self.units.remove(number)
        if unit.prefix is not None:
            self.prefixes[unit.prefix] -= 1


def load_of(parts: Sequence[Unit], chosen: Sequence[int]) -> Load:
    load = Load()
    for i in chosen:
        load.add(i, parts[i])
    return load


def units(batch: TrainBatch) -> list[Unit]:
    """The paired rows of each group; every other row by itself."""
    tokens = batch.row_starts.diff().tolist()
    together: dict[tuple[str, int], list[int]] = {}
    roles = [0] * batch.num_rows if batch.pairs is None else batch.pairs.tolist()
    for row, (group, role) in enumerate(zip(batch.group_ids.tolist(), roles, strict=True)):
        together.setdefault(("group", group) if role else ("row", row), []).append(row)
    if batch.prefix_ids is None or batch.prefix_lengths is None:
        return [Unit(tuple(rows), sum(tokens[row] for row in rows)) for rows in together.values()]
    prefixes, shared = batch.prefix_ids.tolist(), batch.prefix_lengths.tolist()
    found = []
    for rows in together.values():
        total = sum(tokens[row] for row in rows)
        first = rows[0]
        if shared[first] and len({prefixes[row] for row in rows}) == 1:
            own = total - shared[first] * len(rows)
            found.append(Unit(tuple(rows), own, prefixes[first], shared[first]))
        else:
            found.append(Unit(tuple(rows), total))
    return found


def families(parts: Sequence[Unit], chosen: Sequence[int]) -> list[list[int]]:
    """Those of the chosen units that share a prefix, together."""
    found: dict[tuple[str, int], list[int]] = {}
    for i in chosen:
        prefix = parts[i].prefix
        found.setdefault(("unit", i) if prefix is None else ("prefix", prefix), []).append(i)
    return list(found.values())


def shard(parts: Sequence[Unit], num_ranks: int) -> list[list[int]]:
    """Units of each rank with nearly equal token counts.

    What shares a prefix is dealt out as a whole; where that does not balance, single units of it move.

    >>> shard([Unit((i,), n) for i, n in enumerate([5, 3, 3, 1])], 2)
    [[0, 3], [1, 2]]
    """
    wholes = families(parts, range(len(parts)))
    sizes = [Unit(tuple(family), load_of(parts, family).tokens) for family in wholes]
    loads = [Load() for _ in range(num_ranks)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i].own):
        min(loads, key=lambda load: load.tokens).add(i, sizes[i])
    balance(sizes, loads)
    loads = [load_of(parts, [i for w in load.units for i in sizes[w].rows]) for load in loads]
    balance(parts, loads)
    return [sorted(load.units) for load in loads]


def balance(parts: Sequence[Unit], loads: list[Load]) -> None:
    """Units move or change places between the busiest and the idlest as long as that lowers the higher of the two."""
    for _ in range(2 * len(parts)):
        high, low = max(loads, key=lambda x: x.tokens), min(loads, key=lambda x: x.tokens)
        mean = sum(load.tokens for load in loads) / len(loads)
        if high.tokens <= BALANCED * mean or not level(parts, high, low):
            break


def level(parts: Sequence[Unit], high: Load, low: Load) -> bool:
    """Move the unit, or exchange the two, after which the higher load is lowest; False where nothing lowers it."""
    going, coming = [parts[i] for i in high.units], [parts[i] for i in low.units]
    freed, added = (np.array([f(unit) for unit in going]) for f in (high.freed, low.added))
    moved = np.maximum(high.tokens - freed, low.tokens + added)
    best = int(moved.argmin())
    lowest, other = int(moved[best]), None
    if coming:
        back, taken = (np.array([f(unit) for unit in coming]) for f in (low.freed, high.added))
        leaves = np.subtract.outer(freed, taken)
        enters = np.subtract.outer(added, back)
        same = np.array([[a.prefix == b.prefix is not None for b in coming] for a in going])
        own = np.subtract.outer([unit.own for unit in going], [unit.own for unit in coming])
        leaves, enters = np.where(same, own, leaves), np.where(same, own, enters)
        swapped = np.maximum(high.tokens - leaves, low.tokens + enters)
        place = int(swapped.argmin())
        if swapped.flat[place] < lowest:
            lowest = int(swapped.flat[place])
            best, other = divmod(place, len(coming))
    if lowest >= high.tokens:
        return False
    first, second = high.units[best], None if other is None else low.units[other]
    high.remove(first, parts[first])
    if second is not None:
        low.remove(second, parts[second])
        high.add(second, parts[second])
    low.add(first, parts[first])
    return True


def pack(parts: Sequence[Unit], chosen: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Units of each micro-batch within a token budget: first fit, longest first, what shares a prefix as a whole.

    >>> pack([Unit((i,), n) for i, n in enumerate([2, 6, 3])], [0, 1, 2], max_tokens=8)
    [[0, 1], [2]]
    """
    pieces = [
        piece for family in families(parts, chosen) for piece in cut(parts, family, max_tokens)
    ]
    bins: list[Load] = []
    for piece in sorted(pieces, key=lambda piece: -piece.tokens):
        fits = [load for load in bins if load.tokens + piece.tokens <= max_tokens]
        if not fits:
            bins.append(piece)
            continue
        for i in piece.units:
            fits[0].add(i, parts[i])
    return [sorted(load.units) for load in bins]


def cut(parts: Sequence[Unit], family: Sequence[int], max_tokens: int) -> list[Load]:
    """The family, in as many pieces as the budget asks for."""
    pieces: list[Load] = []
    for i in sorted(family, key=lambda i: -parts[i].own):
        unit = parts[i]
        if unit.alone > max_tokens:
            raise ValueError(
                f"a row of {unit.alone} tokens exceeds learner.max_tokens_per_micro_batch = {max_tokens}"
            )
        fits = [load for load in pieces if load.tokens + load.added(unit) <= max_tokens]
        if not fits:
            pieces.append(Load())
        (fits or pieces[-1:])[0].add(i, unit)
    return pieces


@dataclass(frozen=True)
class Partition:
    """Rows of each micro-batch of each rank, and what they cost."""

    plans: list[list[list[int]]]
    tokens: list[int]
    """Computed by each rank, blank micro-batches included."""

    @property
    def imbalance(self) -> float:
        """Tokens of the busiest rank over the mean."""
        return max(self.tokens) * len(self.tokens) / sum(self.tokens)


def partition(batch: TrainBatch, num_ranks: int, max_tokens: int) -> Partition:
    """Every rank gets the same number of micro-batches.

    Ranks reduce gradients together, so one that has fewer micro-batches is given empty ones: the learner turns an
    empty micro-batch into a zero loss that is attached to the graph. Rows that are compared stay together.
    """
    parts = units(batch)
    for unit in parts:
        if len(unit.rows) > 1 and unit.alone > max_tokens:
            raise DataError(
                f"prompt {batch.group_names[unit.rows[0]]!r}: its {len(unit.rows)} chosen and rejected responses have "
                f"{unit.alone} tokens with their prompts and must share one micro-batch, but "
                f"learner.max_tokens_per_micro_batch = {max_tokens}; raise it, or shorten or remove some of them"
            )
    packed = [pack(parts, mine, max_tokens) for mine in shard(parts, num_ranks)]
    num = max(1, *(len(bins) for bins in packed))
    plans, tokens = [], []
    for bins in packed:
        plan = [sorted(row for i in chosen for row in parts[i].rows) for chosen in bins]
        blanks = num - len(plan)
        plans.append(plan + [[] for _ in range(blanks)])
        costs = [load_of(parts, chosen).tokens for chosen in bins]
        tokens.append(sum(costs) + BLANK_TOKENS * blanks)
    return Partition(plans, tokens)
