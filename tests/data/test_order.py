"""The order of the data: a permutation, another one for each key, and reachable at any position."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.rollouts.order import Permutation, ShuffledStream, derive_key

KEYS = st.binary(min_size=16, max_size=16)


@given(n=st.integers(1, 400), key=KEYS)
def test_every_index_once(n: int, key: bytes) -> None:
    shuffle = Permutation(n, key)
    assert sorted(shuffle(i) for i in range(n)) == list(range(n))


@given(index=st.integers(0, 10**12 - 1))
def test_a_huge_set_costs_nothing(index: int) -> None:
    assert 0 <= Permutation(10**12, derive_key(0))(index) < 10**12


@pytest.mark.parametrize("n", [2, 3, 5, 10, 17])
def test_each_index_lands_anywhere_equally_often(n: int) -> None:
    draws = 4000
    for index in (0, n - 1):
        counts = Counter(Permutation(n, derive_key(seed))(index) for seed in range(draws))
        chi_square = sum((counts[row] - draws / n) ** 2 / (draws / n) for row in range(n))
        # Mean n - 1, variance 2 (n - 1): five standard deviations above the mean.
        assert chi_square < (n - 1) + 5 * (2 * (n - 1)) ** 0.5


def test_neighbours_are_not_neighbours_any_more() -> None:
    shuffle = Permutation(1000, derive_key(3))
    rows = [shuffle(i) for i in range(1000)]
    adjacent = sum(abs(a - b) == 1 for a, b in pairwise(rows))
    assert adjacent < 12  # two are expected


@pytest.mark.parametrize("index", [-1, 5])
def test_out_of_range(index: int) -> None:
    with pytest.raises(IndexError):
        Permutation(5, derive_key(0))(index)


def test_empty_set() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Permutation(0, derive_key(0))


def test_key_parts_are_not_run_together() -> None:
    assert derive_key(1, 23) != derive_key(12, 3)


def orders(n: int, **key: object) -> list[list[int]]:
    stream = ShuffledStream(n, **key)  # type: ignore[arg-type]
    return [stream.take(n) for _ in range(3)]


def test_epochs_seeds_and_streams_differ() -> None:
    seen = [
        tuple(epoch)
        for seed in (0, 1)
        for name in ("prompts", "experts")
        for epoch in orders(50, seed=seed, name=name)
    ]
    assert len(set(seen)) == len(seen) == 12
    assert all(sorted(order) == list(range(50)) for order in seen)


@given(sizes=st.lists(st.integers(0, 7), max_size=30), n=st.integers(7, 40))
def test_seek_equals_sequential(sizes: list[int], n: int) -> None:
    stream = ShuffledStream(n, seed=5, name="prompts")
    for size in sizes:
        sought = ShuffledStream(n, seed=5, name="prompts")
        sought.position = stream.position
        assert sought.take(size) == stream.take(size)
        assert sought.position == stream.position


@given(size=st.integers(1, 10), n=st.integers(10, 23))
def test_rows_of_one_take_differ(size: int, n: int) -> None:
    stream = ShuffledStream(n, seed=1, name="prompts")
    for _ in range(30):
        assert len(set(stream.take(size))) == size


def test_a_short_tail_is_skipped() -> None:
    stream = ShuffledStream(10, seed=0, name="prompts")
    stream.take(8)
    assert stream.position == 8
    stream.take(4)
    assert stream.position == 14


def test_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="cannot take 11 different rows of 10"):
        ShuffledStream(10, seed=0, name="prompts").take(11)
