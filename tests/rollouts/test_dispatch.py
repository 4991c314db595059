"""Which worker draws which sample."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from stub_workers import CONFIG, SECONDS, StubWorker, requests

from plait.rollouts import pool as pool_module
from plait.rollouts.pool import Pool


@pytest.fixture
def pool(ray_session, monkeypatch):
    monkeypatch.setattr(pool_module, "RolloutWorker", StubWorker)
    monkeypatch.setattr(pool_module, "environment", lambda config: {SECONDS: "0.05"})
    opened = Pool("stub", CONFIG, dtype="float32", seed=5)
    opened.wait_started()
    yield opened
    opened.close()


def test_samples_of_a_prompt_share_a_worker_and_workers_share_the_load(pool):
    """Two workers with room for eight each; prompts of four samples."""
    stream = pool.generate(requests(), step=0)
    next(stream)
    workers, load = defaultdict(set), Counter()
    for one in pool._owed.values():
        workers[one.task.prompt_id].add(one.member.name)
        load[one.member.name] += 1
    assert {len(names) for names in workers.values()} == {1}
    assert max(load.values()) - min(load.values()) <= 4
    assert len(list(stream)) == 31


def test_a_prompt_of_many_samples_is_drawn_by_all(pool):
    stream = pool.generate(requests(num_prompts=1, n=16), step=0)
    next(stream)
    load = Counter(one.member.name for one in pool._owed.values())
    assert len(load) == 2
    assert len(list(stream)) == 15
