"""Learner ranks that die, stop or sleep, on real DeepSpeed in Ray actors; final weights are compared to the bit."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stub_run import STEPS, StubRun
from stub_workers import CONFIG, SECONDS, StubWorker

from plait.engine.errors import LearnerError, Stalled
from plait.engine.failpoints import ONCE, VARIABLE
from plait.engine.processes import is_alive
from plait.rollouts import pool as pool_module
from plait.rollouts.pool import Pool

pytestmark = pytest.mark.long
StartRun = Callable[..., tuple[StubRun, Path]]


@pytest.fixture(scope="module")
def pool(ray_session) -> Iterator[Pool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "RolloutWorker", StubWorker)
        patch.setattr(pool_module, "environment", lambda config: {SECONDS: "0.01"})
        opened = Pool("stub", CONFIG, dtype="float32", seed=0)
        opened.wait_started()
        yield opened
        opened.close()


@pytest.fixture
def start_run(pool, tiny_model, tmp_path) -> Iterator[StartRun]:
    """`failpoint` strikes one rank, once; the path tells when."""
    runs: list[StubRun] = []

    def start(failpoint: str = "", **fields: Any) -> tuple[StubRun, Path]:
        once = tmp_path / f"once-{len(runs)}"
        once.touch()
        env = {VARIABLE: failpoint, ONCE: str(once)} if failpoint else {}
        folder = tmp_path / f"run-{len(runs)}"
        folder.mkdir()
        run = StubRun(tiny_model, folder, pool, env, **fields)
        runs.append(run)
        return run, Path(f"{once}.struck")

    yield start
    for run in runs:
        run.close()


@pytest.fixture(scope="module")
def expected(pool, tiny_model, tmp_path_factory) -> str:
    """Digest of the final weights of a run that nothing happens to."""
    run = StubRun(tiny_model, tmp_path_factory.mktemp("undisturbed"), pool, {})
    try:
        return run.train().weights
    finally:
        run.close()


def rows_of(run: StubRun) -> list[dict[str, Any]]:
    lines = (run.parts.log.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def check_accounts(run: StubRun) -> None:
    """Each step once, versions without a gap."""
    rows = rows_of(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["policy_version"] for row in rows] == list(range(1, STEPS + 1))


def test_f3_a_rank_that_dies_in_backward(start_run, expected, measured) -> None:
    run, struck = start_run("kill:learner.backward:8")
    state = run.train()
    assert state.weights == expected
    check_accounts(run)
    ((at, said),) = [one for one in run.listener.said if "The learner starts again" in one[1]]
    assert "died in step" in said
    detected = at - struck.stat().st_ctime
    assert detected <= 5
    assert run.ranks.generation == 1
    measured("F3", f"detected {detected:.1f} s, steps redone <= 2 (interval 2), bits equal 1/1")


@pytest.mark.parametrize("point", ["learner.sends:4", "learner.sent:4"])
def test_f4_the_learner_dies_between_optimizer_step_and_sync(
    start_run, expected, measured, point
) -> None:
    run, struck = start_run(f"kill:{point}")
    state = run.train()
    assert struck.exists()
    assert state.weights == expected
    assert (state.optimizer_steps, state.policy_version) == (STEPS, STEPS)
    check_accounts(run)
    measured("F4", "before and during the sync: version gaps 0, double steps 0, bits equal 2/2")


def test_f9_a_stopped_rank_is_fenced_and_replaced(start_run, expected, measured) -> None:
    run, struck = start_run("stop:learner.backward:6")
    state = run.train()
    assert state.weights == expected
    ((at, said),) = [one for one in run.listener.said if "The learner starts again" in one[1]]
    assert "gave no sign of life for learner.silence_seconds = 3 in step" in said
    detected = at - struck.stat().st_ctime
    assert detected <= 3 + 1 + 1, "the heartbeat before was answered up to a second earlier"
    leftover = [file.name for file in (run.parts.checkpoints.folder).glob(".*")]
    assert leftover == [], "nothing of an earlier generation"
    measured("F9", f"rank: detected {detected:.1f} s (limit 3 s), late writes 0, bits equal")


def test_f9_a_stopped_rank_is_dead_before_another_one_starts(start_run) -> None:
    run, _ = start_run("stop:learner.backward:2")
    before: list[int] = []
    restart = run.ranks.restart

    def watched() -> None:
        before.extend(one.place.pid for one in run.ranks._ranks if one.place is not None)
        assert any(map(is_alive, before))
        restart()
        assert not any(map(is_alive, before))

    run.ranks.restart = watched  # type: ignore[method-assign]
    run.train(steps=2)
    assert len(before) == 2


def test_f10_a_rank_that_sleeps_is_named_with_operation_and_step(start_run, measured) -> None:
    run, struck = start_run("sleep:learner.backward:4")
    run.ranks.wait_started()
    limit = 5.0
    run.ranks._config = run.ranks._config.model_copy(update={"timeout_seconds": limit})
    with pytest.raises(Stalled) as caught:
        run.train(max_restarts=0)
    took = time.time() - struck.stat().st_ctime
    assert took <= limit + 5
    late = re.match(
        r"step \d: learner rank (\d) did not finish step within learner.timeout_seconds = 5 \((.*)\)",
        str(caught.value),
    )
    assert late is not None, str(caught.value)
    doing = dict(part.split(": ", 1) for part in late[2].split("; "))
    assert "failpoints.py" in doing[f"rank {late[1]}"], doing
    assert "failpoints.py" not in doing[f"rank {1 - int(late[1])}"], doing
    measured("F10", f"rank, operation and step named after {took:.1f} s (limit {limit:g} s)")


def test_restarts_are_bounded(start_run) -> None:
    run, _ = start_run()
    started = run.ranks.wait_started

    def killed() -> None:
        started()
        os.kill(run.ranks._ranks[0].place.pid, signal.SIGKILL)

    run.ranks.wait_started = killed  # type: ignore[method-assign]
    with pytest.raises(LearnerError, match=r"3 restarts in a row led to no finished step"):
        run.train()
