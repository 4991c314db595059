"""Expert traces that are empty, too long, without an end or without a weight, and prefixes of none or all of one.

Whatever the trace, no token of the prompt trains, no more than the limit trains, and rows without anything to train are
counted. That such traces are found before the run is in tests/data/test_admission.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from bad_steps import HYBRIDS, SIZE, measure, solve, take_step
from plait.engine.errors import DataError
from plait.engine.types import Demonstration, Source, Update
from steps import make_prompt

EXPERTS = (*HYBRIDS, "super_rl", "visurf", "sft")
WHOLE = ("sft", "sasr", "chord", "srft", "luffy", "super_rl", "visurf", "hpt")
"""Those that train a whole demonstration in the step of `step_with`."""
LIMIT, CONTEXT = 12, 2
END = 2
FAILED: list[float | None] = [0.0] * SIZE
HALF: list[float | None] = [1.0, 0.0, 0.0, 1.0]


def trace(size: int, *, end: bool = True, weights: list[float] | None = None) -> Demonstration:
    """`size` tokens; without `end` the last is none that ends a sequence."""
    ids = (*(4 + i % 5 for i in range(size - 1)), END if end else 9)
    columns = {} if weights is None else {"token_weights": tuple(weights)}
    pieces = (2,) * ((size - 1) // 2) + (1,) * ((size - 1) % 2)
    return Demonstration(ids, "x", piece_lengths=pieces, columns=columns)


def step_with(name: str, demonstration: Demonstration) -> list[Update]:
    """Failed rollouts, for which most methods turn to the demonstration; sasr in its supervised half."""
    rewards = HALF if name in ("chord", "luffy", "srft", "visurf") else FAILED
    step = 0 if name == "sasr" else 1
    return take_step(name, rewards, step=step, demonstration=demonstration)[0]


def check_rows(name: str, updates: list[Update]) -> list[int]:
    """Trained expert tokens of each row that has EXPERT tokens; nothing of a prompt trains in any row."""
    trained = []
    for update in updates:
        batch, _ = solve(name, update)
        assert not bool((batch.trained & (batch.source == Source.CONTEXT)).any())
        for sample in update.samples:
            assert (sample.source[:CONTEXT] == Source.CONTEXT).all()
            assert len(sample) <= CONTEXT + LIMIT + 2  # rollouts are two tokens after a prefix
            expert = sample.source == Source.EXPERT
            if expert.any():
                trained.append(int((expert & (sample.weights != 0)).sum()))
    return trained


@pytest.mark.parametrize("name", EXPERTS)
def test_longer_than_the_limit(name, measured):
    updates = step_with(name, trace(40))
    for sample in (s for u in updates for s in u.samples):
        expert = sample.token_ids[sample.source == Source.EXPERT]
        assert len(expert) <= LIMIT
        assert END not in expert  # what is cut off trains nowhere, its end included
    trained = check_rows(name, updates)
    assert max(trained, default=0) <= LIMIT
    if name in WHOLE:
        assert LIMIT in trained
    measured("F26", f"trained tokens on prompts 0, beyond the limit 0, in {len(EXPERTS)} methods")


@pytest.mark.parametrize("name", EXPERTS)
def test_without_an_end(name):
    """Nothing is put in its place: the tokens that are there train."""
    updates = step_with(name, trace(7, end=False))
    for sample in (s for u in updates for s in u.samples):
        assert END not in sample.token_ids[sample.source == Source.EXPERT]
    trained = check_rows(name, updates)
    if name in WHOLE:
        assert 7 in trained


@pytest.mark.parametrize("name", WHOLE)
def test_an_empty_one_is_named(name):
    with pytest.raises(DataError, match="prompt 'a': its demonstration has no tokens; remove it"):
        step_with(name, replace(make_prompt("a").demonstrations[0], token_ids=()))


@pytest.mark.parametrize("name", ["sft", "sasr", "super_rl", "hpt"])
@pytest.mark.parametrize("size", [7, 40], ids=["all", "within the limit"])
def test_without_a_weight_within_the_limit_nothing_trains_and_it_is_counted(name, size, measured):
    weights = [0.0] * min(size, LIMIT) + [1.0] * max(size - LIMIT, 0)
    updates = step_with(name, trace(size, weights=weights))
    for update in updates:
        batch, moved = solve(name, update)
        assert (batch.denom.expert_tokens, batch.denom.expert_rows, moved) == (0, 0, 0)
    metrics = measure(updates, [])
    assert metrics["rows/trained"] == 0
    assert metrics["rows/untrained"] == sum(len(update.samples) for update in updates) > 0
    assert metrics["updates/untrained"] == len(updates)
    measured("F26", "fully masked rows counted, optimizer steps 0")


@pytest.mark.parametrize("size", [7, 40])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_prefixes_of_none_and_of_all(ratio, size):
    """prefix_rft: of none at least min_prefix_tokens are forced, of all as many as leave a token to sample."""
    ratios = {f"prefix_ratio_{name}": ratio for name in ("low_start", "low_end", "high")}
    updates, _ = take_step("prefix_rft", HALF, demonstration=trace(size), **ratios)
    (update,) = updates
    batch, _ = solve("prefix_rft", update)
    assert not bool((batch.trained & (batch.source == Source.CONTEXT)).any())
    prefixes = [int((s.source == Source.EXPERT).sum()) for s in update.samples]
    longest = max(prefixes)
    assert longest == (1 if ratio == 0 else min(size - 1, LIMIT - 1)), prefixes
    for sample, prefix in zip(update.samples, prefixes, strict=True):
        assert (sample.source == Source.POLICY).sum() == len(sample) - CONTEXT - prefix > 0


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_hints_of_none_and_of_all(probability):
    """uft: a hint of nothing is a plain rollout, one of all pieces stops before the last."""
    fields = {f"hint_probability_{name}": probability for name in ("high", "low")}
    updates, _ = take_step("uft", HALF, demonstration=trace(9), **fields)
    (update,) = updates
    hints = [int((s.source == Source.EXPERT).sum()) for s in update.samples]
    assert set(hints) == ({0} if probability == 0 else {6})
    batch, _ = solve("uft", update)
    assert not bool((batch.trained & (batch.source == Source.CONTEXT)).any())
