"""Rollout workers that die, stop or are half-updated, on stub engines in real Ray actors."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from stub_learner import StubLearner
from stub_workers import CONFIG, FAILPOINTS, NUM_PARAMETERS, SECONDS, StubWorker, requests

from plait.engine.errors import RolloutError, Stalled, WorkerLost
from plait.engine.processes import is_alive
from plait.engine.types import Sampling
from plait.rollouts import crew
from plait.rollouts import pool as pool_module
from plait.rollouts.pool import Pool
from plait.rollouts.worker import RolloutWorker, SampleTask

OpenPool = Callable[..., Pool]


@pytest.fixture
def open_pool(ray_session, monkeypatch) -> Iterator[OpenPool]:
    """Pools of stub workers; `failpoints`, `seconds` of a sample and fields of the config by keyword."""
    monkeypatch.setattr(pool_module, "RolloutWorker", StubWorker)
    opened: list[Pool] = []

    def start(failpoints: str = "", seconds: float = 0.05, **fields: Any) -> Pool:
        env = {FAILPOINTS: failpoints, SECONDS: str(seconds)}
        monkeypatch.setattr(pool_module, "environment", lambda config: env)
        pool = Pool("stub", CONFIG.model_copy(update=fields), dtype="float32", seed=5)
        opened.append(pool)
        pool.wait_started()
        return pool

    yield start
    for pool in opened:
        pool.close()


def pid_of(pool: Pool, number: int = 0) -> int:
    place: Any = ray.get(pool.receivers()[number].place.remote())
    return place.pid


def wait_until(condition: Callable[[], object], seconds: float) -> float:
    """How long it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - started


def test_f1_an_idle_worker_that_dies_is_replaced_and_synced(open_pool, measured) -> None:
    pool = open_pool()
    learner = StubLearner(pool)
    learner.publish(1)
    learner.publish(2)
    killed = time.monotonic()
    os.kill(pid_of(pool), signal.SIGKILL)
    wait_until(lambda: pool.losses, 5)
    detected = pool.losses[0].at - killed
    assert detected <= 5
    learner.check(list(pool.generate(requests(), step=1)), 1)
    wait_until(lambda: len(pool.receivers()) == 2, 60)
    recovered = time.monotonic() - killed
    learner.check(list(pool.generate(requests(), step=2)), 2)
    assert learner.joined == 1, "before its first sample"
    assert len(learner.publish(3).workers) == 2
    measured("F1", f"detected {detected:.1f} s, back {recovered:.1f} s, lost samples 0")


def test_f2_what_a_dead_worker_owed_is_drawn_by_another_once(open_pool, measured) -> None:
    pool = open_pool("rollout-1=kill:stub.draws:6")
    learner = StubLearner(pool)
    learner.publish(1)
    rollouts = list(pool.generate(requests(), step=1))
    learner.check(rollouts, 1)
    assert [loss.worker for loss in pool.losses] == ["rollout-1"]
    assert 1 <= pool.reissued <= 2 * CONFIG.max_num_seqs
    measured("F2", f"asked again {pool.reissued} of 32, duplicates 0, lost 0")


def test_f2_the_only_worker_is_waited_for(open_pool) -> None:
    pool = open_pool("rollout-0=kill:stub.draws:6", num_workers=1)
    learner = StubLearner(pool)
    learner.publish(1)
    learner.check(list(pool.generate(requests(), step=1)), 1)
    assert learner.joined == 1


def test_f2_a_prompt_that_kills_its_workers_is_named(open_pool) -> None:
    points = ",".join(f"rollout-{n}=kill:stub.draws" for n in range(9))
    pool = open_pool(points, num_workers=1, max_reissues=1)
    with pytest.raises(RolloutError, match=r"prompt p/\d \(index \d\) lost its worker 2 times"):
        list(pool.generate(requests(), step=0))


def test_workers_that_never_finish_a_sample_are_given_up(open_pool) -> None:
    points = ",".join(f"rollout-{n}=kill:stub.draws" for n in range(9))
    pool = open_pool(points, num_workers=1, max_restarts=2, max_reissues=9)
    with pytest.raises(RolloutError, match=r"no rollout worker is left after .*max_restarts = 2"):
        list(pool.generate(requests(), step=0))


def test_a_spare_takes_over_at_once(open_pool) -> None:
    pool = open_pool(num_workers=1, num_spares=1)
    learner = StubLearner(pool)
    assert len(learner.publish(1).workers) == 1, "spares get no weights"
    os.kill(pid_of(pool), signal.SIGKILL)
    took = wait_until(lambda: pool.losses, 5)
    started = time.monotonic()
    learner.check(list(pool.generate(requests(), step=1)), 1)
    assert time.monotonic() - started < 2, f"noticed after {took:.1f} s"
    assert pool._crew.members[0].name == "rollout-1"


def test_a_spare_takes_the_place_that_is_given_up(monkeypatch) -> None:
    """Also one that is not up yet: else nobody would ever serve, and nobody would say so."""
    monkeypatch.setattr(crew, "is_ready", lambda ref: False)
    monkeypatch.setattr(crew, "kill_actor", lambda actor, place: None)
    call = SimpleNamespace(remote=lambda: None)
    config = CONFIG.model_copy(update={"num_workers": 1, "num_spares": 1, "max_restarts": 0})
    workers = crew.Crew(lambda name, seat: SimpleNamespace(place=call, start=call), config)
    workers.begin()
    workers.lose(workers.members[0], "rollout-0 died")
    assert [member.name for member in workers.members] == ["rollout-1"]
    assert workers.failure is None
    workers.lose(workers.members[0], "rollout-1 died")
    assert "no rollout worker is left" in str(workers.failure)
    workers.close()


def test_a_slow_consumer_is_not_taken_for_a_silent_worker(open_pool) -> None:
    pool = open_pool(num_workers=1, sample_timeout_seconds=1.0)
    stream = pool.generate(requests(), step=0)
    rollouts = [next(stream)]
    time.sleep(2)
    rollouts += stream
    assert len(rollouts) == 32
    assert not pool.losses


def test_f9_a_stopped_worker_is_replaced_and_not_heard_when_it_wakes(
    open_pool, measured, monkeypatch
) -> None:
    survived: list[Any] = []
    monkeypatch.setattr(crew, "kill_actor", lambda actor, place: survived.append((actor, place)))
    pool = open_pool(seconds=0.3)
    learner = StubLearner(pool)
    learner.publish(1)
    victim = pid_of(pool, 1)
    stream = pool.generate(requests(), step=1)
    rollouts = [next(stream)]
    stopped = time.monotonic()
    os.kill(victim, signal.SIGSTOP)
    rollouts += stream
    (loss,) = pool.losses
    detected = loss.at - stopped
    assert detected <= CONFIG.silence_seconds + 1
    learner.check(rollouts, 1)
    os.kill(victim, signal.SIGCONT)  # it finishes what it owed: nobody listens
    learner.check(list(pool.generate(requests(), step=2)), 2)
    ((actor, place),) = survived
    assert ray.get(actor.beat.remote()) is None, "the zombie lives"
    assert actor not in pool.receivers()
    monkeypatch.undo()
    crew.kill_actor(actor, place)
    wait_until(lambda: not is_alive(victim), 5)
    limit = CONFIG.silence_seconds
    measured("F9", f"worker: detected {detected:.1f} s (limit {limit:g} s), late samples taken 0")


def test_f9_a_stopped_worker_is_killed(open_pool) -> None:
    pool = open_pool()
    victim = pid_of(pool)
    os.kill(victim, signal.SIGSTOP)
    wait_until(lambda: pool.losses, 5)
    wait_until(lambda: not is_alive(victim), 5)


def test_f9_a_worker_that_answers_but_finishes_nothing_is_replaced(open_pool) -> None:
    """Its engine hangs: heartbeats come, samples do not."""
    pool = open_pool(seconds=60, num_workers=1, sample_timeout_seconds=1.0, max_reissues=1)
    with pytest.raises(Stalled, match=r"prompt p/\d.*finished no sample within .*oldest is prompt"):
        list(pool.generate(requests(), step=0))


POINTS = ["stub.start", *(f"stub.bucket:{k}" for k in range(1, NUM_PARAMETERS + 1)), "stub.finish"]


@pytest.mark.long
@pytest.mark.parametrize("point", POINTS)
def test_f11_a_receiver_that_dies_in_a_sync_leaves_no_mixed_weights(
    open_pool, measured, point
) -> None:
    pool = open_pool(f"rollout-1=kill:{point}")
    learner = StubLearner(pool)
    proof = learner.publish(1)
    assert proof.workers == ("rollout-0",), "the others get their weights"
    learner.check(list(pool.generate(requests(), step=1)), 1)
    wait_until(lambda: len(pool.receivers()) == 2, 60)
    assert len(learner.publish(2).workers) == 2
    learner.check(list(pool.generate(requests(), step=2)), 2)
    measured("F11", f"{len(POINTS)} of {len(POINTS)} points: samples of a wrong version 0")


def test_f11_a_half_updated_worker_refuses_until_it_is_replaced(open_pool, measured) -> None:
    """Its sender dies between buckets."""
    pool = open_pool(num_workers=1)
    learner = StubLearner(pool)
    learner.publish(1)
    (receiver,) = pool.receivers()
    ray.get(receiver.start_weight_update.remote())
    with pytest.raises(WorkerLost, match="no rollout worker lived to prove version 2"):
        learner.publish(2)
    learner.publish(2)
    learner.check(list(pool.generate(requests(), step=2)), 2)
    assert "weights are undefined" in pool.losses[0].reason
    measured("F11", "sender dies: half-updated worker refuses, is replaced")


class Dead(Exception):
    """What vLLM raises once its process has ended."""


class DeadEngine:
    async def collective_rpc(self, method: str) -> None:
        raise Dead

    async def start_weight_update(self) -> None:
        raise Dead

    async def generate(self, *args: Any) -> AsyncIterator[Any]:
        raise Dead
        yield


@pytest.mark.parametrize(
    "ask",
    [
        lambda worker: worker.beat(),
        lambda worker: worker.prove(0, ()),
        lambda worker: worker.start_weight_update(),
        lambda worker: worker._request((1, 2), None, "a test"),
    ],
)
def test_whoever_meets_a_dead_engine_calls_its_worker_lost(ask) -> None:
    """So that it is replaced: every other error ends the run."""
    worker = RolloutWorker("rollout-0", "stub", CONFIG, "float32")
    worker._engine, worker._engine_dead = DeadEngine(), (Dead,)
    worker._refusal, worker._updates = "", 1
    with pytest.raises(WorkerLost, match="vLLM died in rollout worker rollout-0"):
        asyncio.run(ask(worker))


def test_a_request_that_vllm_cannot_run_is_named_with_its_cause() -> None:
    from vllm.v1.engine.exceptions import EngineGenerateError

    class Failing:
        async def generate(self, *args: Any) -> AsyncIterator[Any]:
            raise EngineGenerateError from MemoryError("no block left")
            yield

    worker = RolloutWorker("rollout-0", "stub", CONFIG, "float32")
    worker._engine, worker._refusal = Failing(), ""
    task = SampleTask("p/3", 1, (1, 2), (), Sampling(8), seed=0)
    with pytest.raises(
        RolloutError, match=r"at prompt p/3 \(index 1\): MemoryError.*no block left"
    ):
        asyncio.run(worker.generate(task))


def test_no_worker_in_time_names_what_it_waits_for(open_pool) -> None:
    pool = open_pool("rollout-1=stop:stub.starts", num_workers=1, start_timeout_seconds=3.0)
    os.kill(pid_of(pool), signal.SIGKILL)
    with pytest.raises(Stalled, match=r"no rollout worker serves .*rollout-\d .* for \d s"):
        list(pool.generate(requests(), step=0))
