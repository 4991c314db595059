"""A prompt that a probe found out of reach trains as if its rollouts had all failed, without being rolled out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from plait.algorithms import ALGORITHMS, AlgorithmBase
from plait.engine.types import Prompt, Update
from steps import PROMPTS, SETUP, answer, make_prompt

GATED = {"hpt": {}, "super_rl": {}, "relift": {"expert_batch_size": 2}}
BARE = make_prompt("bare", demonstrated=False)
OUT = {"a", "c", "bare"}
REWARDS = {"a": [0.0] * 4, "b": [1.0, 0.0, 1.0, 0.0], "c": [0.0] * 4, "bare": [0.0] * 4}


def build(name: str, steps: int) -> AlgorithmBase:
    cls = ALGORITHMS[name]
    values = {"type": name, "rollouts_per_prompt": 4, "skip_out_of_reach_steps": steps}
    config = cls.Config.model_validate(values | GATED[name])
    return cls(config, replace(SETUP, is_out_of_reach=OUT.__contains__))


def step(
    algorithm: AlgorithmBase, prompts: Sequence[Prompt], at: int
) -> tuple[int, Sequence[Update]]:
    """Prompts rolled out, and the updates."""
    plan = algorithm.plan(prompts, (), at)
    groups = [answer([request], REWARDS)[0] for request in plan.requests]
    return len(groups), algorithm.assemble(plan, groups, at)


def trained(updates: Sequence[Update]) -> list[list[tuple]]:
    """Rows of each update, in an order of their own."""
    return [
        sorted((s.group_id, *s.source.tolist(), *s.advantages.tolist()) for s in update.samples)
        for update in updates
    ]


@pytest.mark.parametrize("name", GATED)
def test_it_trains_as_if_all_its_rollouts_had_failed(name: str) -> None:
    prompts = [*PROMPTS, BARE]
    gated, open_ = build(name, steps=2), build(name, steps=0)
    asked, mine = step(gated, prompts, 1)
    assert asked == 2, "b, and the prompt without a demonstration"
    assert step(open_, prompts, 1)[0] == 4
    _, whole = step(open_, prompts, 1)
    if name == "relift":  # the failed groups have no advantage, but they are rows
        assert trained(mine)[1:] == trained(whole)[1:] != []
        assert gated.metrics()["failed_prompts"] == 3
    else:
        assert trained(mine) == trained(whole)
        assert [u.coefs for u in mine] == [u.coefs for u in whole]
    assert gated.ledger(mine, 1).gate_rate == open_.ledger(whole, 1).gate_rate


@pytest.mark.parametrize("name", GATED)
def test_it_is_rolled_out_later(name: str) -> None:
    assert step(build(name, steps=2), PROMPTS, 2)[0] == len(PROMPTS)


@pytest.mark.parametrize("name", ["hpt", "super_rl"])
def test_a_step_may_be_of_demonstrations_alone(name: str) -> None:
    algorithm = build(name, steps=2)
    asked, (update,) = step(algorithm, [PROMPTS[0], PROMPTS[2]], 0)
    assert asked == 0
    assert {s.group_id for s in update.samples} == {"a", "c"}
    assert algorithm.ledger([update], 0).gate_rate == 1.0


def test_relift_queues_it() -> None:
    algorithm = build("relift", steps=2)
    step(algorithm, [PROMPTS[0], PROMPTS[1]], 0)
    assert algorithm.ledger((), 0).unused["a"] == "buffered"
    asked, updates = step(algorithm, [PROMPTS[2]], 1)
    assert asked == 0
    assert [u.loss for u in updates if u.samples] == ["sft"]
    assert [s.group_id for s in updates[-1].samples] == ["c", "a"]
