"""Shaping moves advantages; gates, filters and the sign of a verdict do not see it."""

from dataclasses import replace

import numpy as np
import pytest

from plait.algorithms import ALGORITHMS
from plait.engine.batch import collate
from plait.engine.types import RolloutGroup, Score, Source

from .test_group_assembly import assemble, build, demonstrate, make_group, make_prompt


def shape(group: RolloutGroup, *shaping: float) -> RolloutGroup:
    scores = (replace(s, shaping=x) for s, x in zip(group.scores, shaping, strict=True))
    return replace(group, scores=tuple(scores))


def policy_advantages(name: str, group: RolloutGroup, **config: object) -> list[float]:
    rows = assemble(build(name, **config), group).samples
    own = [row for row in rows if (row.source == Source.POLICY).any()]
    return [float(row.advantages[row.source == Source.POLICY][0]) for row in own]


@pytest.mark.parametrize("name", ["grpo", "luffy", "visurf", "topr"])
def test_advantages_are_of_shaped_rewards(name: str) -> None:
    prompt = make_prompt("a", demonstrate(8, 9, 2))
    config = (
        {"advantage": "group_mean"} if "advantage" in ALGORITHMS[name].Config.model_fields else {}
    )
    plain = make_group(prompt, 1.0, 1.0, 0.0, 0.0)
    tilted = shape(plain, 0.0, -0.5, 0.0, 0.0)
    summed = make_group(prompt, 1.0, 0.5, 0.0, 0.0)
    assert policy_advantages(name, tilted, **config) == policy_advantages(name, summed, **config)
    assert policy_advantages(name, tilted, **config) != policy_advantages(name, plain, **config)


def test_a_group_without_a_signal_is_dropped_by_its_verdicts() -> None:
    group = shape(make_group(make_prompt("a"), 1.0, 1.0, 1.0, 1.0), 0.0, -0.5, 0.0, 0.0)
    update = assemble(build("grpo", drop_uniform_groups=True), group)
    assert all((row.weights == 0).all() for row in update.samples)


@pytest.mark.parametrize("name", ["srft", "rift"])
def test_the_sign_of_the_verdict_is_not_shaped(name: str) -> None:
    prompt = make_prompt("a", demonstrate(8, 9, 2))
    plain = make_group(prompt, 1.0, 1.0, 0.0, 0.0)
    tilted = shape(plain, 0.0, -0.5, 0.0, 5.0)
    assert policy_advantages(name, tilted) == policy_advantages(name, plain)


def test_gates_count_verdicts() -> None:
    prompt = make_prompt("a", demonstrate(8, 9, 2))
    solved = shape(make_group(prompt, 1.0, 1.0, 1.0, 1.0), *[-0.9] * 4)
    update = assemble(build("hpt"), solved)
    assert all((row.source == Source.POLICY).any() for row in update.samples)


def test_demonstrations_are_compared_with_their_shaping() -> None:
    graded = replace(Score.ok(1.0), shaping=-1.0)
    group = make_group(make_prompt("a", demonstrate(8, 9, 2, score=graded)), 0.0, 0.0, 0.0, 0.0)
    rows = assemble(build("luffy"), group).samples
    assert all(np.all(row.advantages == 0) for row in rows)


def test_the_critic_learns_shaped_rewards() -> None:
    group = shape(make_group(make_prompt("a"), 1.0, 0.0), -0.25, 0.0)
    batch = collate(assemble(build("grpo", rollouts_per_prompt=2), group).samples)
    assert batch.rewards.tolist() == [0.75, 0.0]
