"""polychromic: sets and their draws, and what it makes of groups with unknown scores or few rows."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from pydantic import ValidationError

from plait.algorithms import Setup
from plait.algorithms.polychromic import (
    Polychromic,
    PolychromicConfig,
    all_sets,
    choose_sets,
    credit_sets,
)
from plait.engine.errors import DataError
from plait.engine.types import Prompt, Rollout, RolloutGroup, Sampling, Score, StepPlan

UNKNOWN = Score.unknown("deadline")


def build(seed: int = 0, **config: Any) -> Polychromic:
    return Polychromic(PolychromicConfig(**config), Setup(Sampling(8), minibatches=2, seed=seed))


def make_group(name: str, *scores: tuple[float, str] | None) -> RolloutGroup:
    """One rollout of two tokens a score (reward, answer); None is UNKNOWN."""
    prompt = Prompt(name, (), (5, 6))
    rollouts = tuple(
        Rollout(name, i, (7, 2), 0, (-0.5, -0.25), 3, "stop", "") for i in range(len(scores))
    )
    known = tuple(UNKNOWN if s is None else Score.ok(s[0], answer=s[1]) for s in scores)
    return RolloutGroup(prompt, rollouts, known)


def advantages(algorithm: Polychromic, *groups: RolloutGroup, step: int = 0) -> list[float]:
    """One a row: that of its last token."""
    (update,) = algorithm.assemble(StepPlan(), groups, step)
    assert (update.loss, update.minibatches) == ("main", 2)
    return [float(row.advantages[-1]) for row in update.samples]


MIXED = ((1.0, "a"), (0.0, "b"), (1.0, "a"), (0.0, "c"))


def test_all_sets_are_taken_in_lexicographic_order_while_they_fit():
    config = PolychromicConfig(set_size=2, max_sets_per_group=6)
    assert choose_sets(4, config, 0) == list(combinations(range(4), 2))
    assert len(choose_sets(5, config, 0)) == 6
    assert all_sets(3, 4) == choose_sets(3, PolychromicConfig(), 0) == [(0, 1, 2)]


@pytest.mark.parametrize("wanted", [1, 30, 69])
def test_drawn_sets_are_different_and_depend_on_the_key_alone(wanted):
    config = PolychromicConfig(set_size=4, max_sets_per_group=wanted)
    sets = choose_sets(8, config, 0, "polychromic", 5, "a")
    assert len(set(sets)) == len(sets) == wanted
    assert set(sets) <= set(combinations(range(8), 4))
    assert sets == choose_sets(8, config, 0, "polychromic", 5, "a")
    keys = [(1, "polychromic", 5, "a"), (0, "polychromic", 6, "a"), (0, "polychromic", 5, "b")]
    assert all(choose_sets(8, config, *key) != sets for key in keys)


def test_every_row_is_drawn_equally_often():
    config = PolychromicConfig(set_size=4, max_sets_per_group=10)
    counts = [0] * 12
    for step in range(300):
        for rows in choose_sets(
            12, PolychromicConfig(**{**dict(config), "rollouts_per_prompt": 12}), step
        ):
            for i in rows:
                counts[i] += 1
    assert all(count == pytest.approx(1000, rel=0.1) for count in counts)


def test_objectives_and_advantages_by_hand():
    found = credit_sets([1.0, 0.0, 1.0], ["a", "b", "a"], all_sets(3, 2), 2)
    assert found.diversities == [1.0, 0.5, 1.0]
    assert found.objectives == [0.5, 0.5, 0.5]
    assert found.set_advantages == found.advantages == [0.0, 0.0, 0.0]
    found = credit_sets([1.0, 0.0, 0.0, 0.0], ["a", "b", "b", "c"], [(0, 1), (1, 2)], 2)
    assert found.objectives == [0.5, 0.0]
    assert found.advantages == [0.25, 0.0, -0.25, 0.0], "the last row is in no set"


def test_a_different_wrong_answer_is_worth_more_than_one_more_of_the_same():
    rows = ((1.0, "a"), (0.0, "b"), (0.0, "b"), (0.0, "c"))
    right, same, _, other = advantages(build(set_size=3), make_group("p", *rows))
    assert right > other > same


def test_resuming_repeats_the_draws():
    group = make_group("p", *MIXED, *MIXED)
    algorithm = build(max_sets_per_group=5)
    first, second = advantages(algorithm, group, step=0), advantages(algorithm, group, step=1)
    assert first != second
    assert algorithm.state_dict() == {}
    assert advantages(build(max_sets_per_group=5), group, step=1) == second
    assert advantages(build(1, max_sets_per_group=5), group, step=1) != second


def test_unknown_scores_are_in_no_set():
    known = advantages(build(set_size=2), make_group("p", *MIXED))
    with_unknown = make_group("p", MIXED[0], None, *MIXED[1:], None)
    assert advantages(build(set_size=2), with_unknown) == known
    assert any(known)
    assert advantages(build(), make_group("p", None, None)) == []
    assert build().metrics() == {}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_group_with_one_set_has_no_advantage(size):
    assert advantages(build(set_size=size), make_group("p", *MIXED[:1])) == [0.0]
    assert advantages(build(set_size=4), make_group("p", *MIXED[:size])) == [0.0] * size


def test_groups_do_not_share_sets():
    a, b = make_group("a", *MIXED), make_group("b", *((0.0, "x") for _ in range(4)))
    algorithm = build(set_size=2)
    assert advantages(algorithm, b, a) == [0.0] * 4 + advantages(algorithm, a)


def test_mean_diversity_of_the_step_is_reported():
    algorithm = build(set_size=2)
    same = make_group("b", *((1.0, "x") for _ in range(4)))
    advantages(algorithm, make_group("a", *MIXED), same)
    assert algorithm.metrics() == {"set_diversity": pytest.approx((5 * 1.0 + 7 * 0.5) / 12)}
    advantages(algorithm, make_group("a", None))
    assert algorithm.metrics() == {}


def test_a_reward_without_answers_is_refused():
    prompt = Prompt("p7", (), (5, 6))
    rollout = Rollout("p7", 0, (7, 2), 0, (-0.5, -0.25), 3, "stop", "")
    group = RolloutGroup(prompt, (rollout,), (Score.ok(1.0),))
    with pytest.raises(DataError, match=r"'p7'.*Score.ok\(reward, answer=...\)"):
        build().assemble(StepPlan(), [group], 0)


def test_uniform_groups_are_dropped_when_asked():
    equal = make_group("p", (1.0, "a"), (1.0, "b"), (1.0, "b"))
    (update,) = build(set_size=2, drop_uniform_groups=True).assemble(StepPlan(), [equal], 0)
    assert not any(row.weights.any() for row in update.samples)
    assert any(advantages(build(set_size=2), equal)), "answers alone are a signal"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"set_size": 8}, r"set_size = 8 .* rollouts_per_prompt = 8"),
        ({"rollouts_per_prompt": 4}, r"set_size = 4 .* rollouts_per_prompt = 4"),
        ({"set_size": 0}, "set_size"),
        ({"advantage": "group_mean"}, "Extra inputs"),
    ],
)
def test_settings_without_effect_are_refused(config, words):
    with pytest.raises(ValidationError, match=words):
        PolychromicConfig(**config)
