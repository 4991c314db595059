"""F37: results that come late, twice or out of order are used once, and training does not see their order."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from stub_learner import StubLearner
from stub_workers import CONFIG, SECONDS, StubWorker, requests

from plait.engine.errors import RewardError
from plait.engine.types import Score
from plait.rewards.groups import ExpectedGroups
from plait.rollouts import crew
from plait.rollouts import pool as pool_module
from plait.rollouts.pool import Pool

SEEDS = range(3)


@pytest.fixture
def pool(ray_session, monkeypatch):
    """Two workers that outlive being given up, so that they still answer what was asked for again."""
    monkeypatch.setattr(crew, "kill_actor", lambda actor, place: None)
    monkeypatch.setattr(pool_module, "RolloutWorker", StubWorker)
    monkeypatch.setattr(pool_module, "environment", lambda config: {SECONDS: "0.05"})
    opened = Pool("stub", CONFIG, dtype="float32", seed=5)
    opened.wait_started()
    yield opened
    opened.close()


def groups_of(rollouts: list[Any]) -> Any:
    """As a scorer makes them, in whatever order they come."""
    groups, scores = ExpectedGroups(requests()), {}
    for rollout in rollouts:
        groups.admit(rollout)
        scores[rollout.prompt_id, rollout.index] = Score.ok(float(rollout.token_ids[0] % 2))
    groups.check_complete()
    return groups.grouped(scores)


def test_f37_late_double_and_reordered_results_are_used_once(pool, monkeypatch, measured):
    learner = StubLearner(pool)
    learner.publish(1)
    calm = groups_of(list(pool.generate(requests(), step=1)))
    wait = pool_module.ray.wait
    for seed in SEEDS:
        rng = random.Random(seed)

        def reordered(refs: Any, rng: random.Random = rng, **options: Any) -> Any:
            """Finished results in any order, each perhaps a few rounds later."""
            ready, late = wait(list(refs), timeout=options["timeout"])
            more, late = wait(late, num_returns=len(late), timeout=0) if late else ([], [])
            found = [*ready, *more]
            rng.shuffle(found)
            return found, late

        monkeypatch.setattr(pool_module.ray, "wait", reordered)
        stream = pool.generate(requests(), step=1)
        rollouts = [next(stream) for _ in range(5 + seed)]
        if seed == SEEDS[-1]:  # a false alarm: what it owes is asked for again, and answered twice
            given_up = pool._crew.up()[0]
            pool._crew.lose(given_up, "given up by the test")
        rollouts += stream
        monkeypatch.setattr(pool_module.ray, "wait", wait)
        counts = Counter((r.prompt_id, r.index) for r in rollouts)
        assert len(counts) == 32
        assert set(counts.values()) == {1}
        assert groups_of(rollouts) == calm, "same groups, same order within them"
    assert pool.reissued > 0
    measured(
        "F37", f"trained twice 0, order of arrival seen by training 0 ({pool.reissued} asked twice)"
    )


def test_f37_a_result_that_comes_twice_is_refused_where_groups_are_made(pool):
    rollouts = list(pool.generate(requests(), step=1))
    with pytest.raises(RewardError, match="came twice"):
        groups_of([*rollouts[:3], rollouts[1]])
