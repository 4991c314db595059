"""How a step grows from 1 to 512 rollout workers and 64 learner ranks, without a cluster: what docs/scaling.md shows.

    python benchmarks/scaling.py

The loop, pool, journal, collation and packing are the real ones, and their time on this machine is real. Ray, workers
and ranks are simulated: what would be waited for is added to a clock and not waited for, and each call of Ray costs
the driver what it costs here, measured first. Nothing is spent on networks, and heartbeats are not counted.
"""

from __future__ import annotations

import heapq
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import ray

from idle_run import PROMPT_TOKENS, idle_loop
from idle_workers import CHECKSUMS
from plait.engine import loop, metrics
from plait.engine.types import Rollout, UpdateReport
from plait.launch.cluster import ray_cluster
from plait.rollouts import crew, pool
from plait.rollouts.config import RolloutConfig
from plait.rollouts.worker import SampleTask, WorkerProof

SIZES = (1, 8, 32, 128, 512)
WORKERS_PER_RANK, PROMPTS_PER_WORKER, SLOTS = 8, 8, 16
MEAN_TOKENS, LONGEST, TOKEN_SECONDS = 512, 2048, 0.025
"""Responses are log-normal; a worker draws a token of each of its SLOTS samples in TOKEN_SECONDS."""
TRAINED_TOKENS_PER_SECOND = 12_000
"""Of one rank."""
STEPS = 3


@dataclass(frozen=True)
class Costs:
    """Seconds that Ray costs the driver here."""

    submit: float
    get: float
    wait: float
    """For each reference that is waited for."""
    byte: float
    """For each byte that a rank is sent."""


class Clock:
    """Real time, and what was skipped."""

    def __init__(self) -> None:
        self.skipped = 0.0
        self.spent: dict[str, float] = defaultdict(float)
        """What was charged to the driver, by kind of call."""
        self.is_idle: Callable[[], bool] = lambda: True
        """Whether the main thread waits for an update."""
        self.computes = False
        """Whether another thread does."""

    def now(self) -> float:
        return time.perf_counter() + self.skipped

    def skip(self, seconds: float) -> None:
        """Go on at once; but no time is skipped in which another thread computes."""
        while self.computes and threading.current_thread() is threading.main_thread():
            time.sleep(0.0002)
        self.skipped += max(0.0, seconds)

    def reach(self, moment: float) -> None:
        """Wait for a moment; beside the main thread, which skips the time meanwhile, until it has nothing to do."""
        self.computes = False
        beside = threading.current_thread() is not threading.main_thread()
        while beside and not self.is_idle() and self.now() < moment:
            time.sleep(0.0002)
        self.skip(moment - self.now())
        self.computes = beside

    def update_beside(self, update: Callable[..., Any]) -> Callable[..., Any]:
        """`loop.apply_updates`, which says when it computes beside the main thread."""

        def run(*arguments: Any) -> Any:
            self.computes = threading.current_thread() is not threading.main_thread()
            try:
                return update(*arguments)
            finally:
                self.computes = False

        return run

    def charge(self, kind: str, seconds: float) -> None:
        self.spent[kind] += seconds
        self.skip(seconds)


class Ref:
    """What a simulated call returns; its value is there at a time of the clock."""

    def __init__(self, value: Any, at: float = 0.0) -> None:
        self.value, self.at = value, at


class Worker:
    """A rollout worker with so many slots, each of which draws one sample after the other."""

    def __init__(self, clock: Clock, costs: Costs) -> None:
        self._clock, self._costs, self._free, self.version = clock, costs, [0.0] * SLOTS, 0
        self.drawn: list[int] = []
        """Lengths of all samples so far."""
        for name in ("start", "place", "beat"):
            setattr(self, name, SimpleNamespace(remote=lambda: Ref(None)))
        self.generate = SimpleNamespace(remote=self._generate)
        self.prove = SimpleNamespace(remote=self._prove)

    def _generate(self, task: SampleTask) -> Ref:
        self._clock.charge("submit", self._costs.submit)
        draw = np.random.default_rng(task.seed)
        length = int(draw.lognormal(np.log(MEAN_TOKENS) - 0.5, 1.0).__ceil__())
        length = min(length, LONGEST)
        self.drawn.append(length)
        begins = max(self._clock.now(), heapq.heappop(self._free))
        heapq.heappush(self._free, begins + length * TOKEN_SECONDS)
        tokens = tuple(draw.integers(3, 300, length).tolist())
        sample = Rollout(
            task.prompt_id, task.index, tokens, 0, (-1.0,) * length, self.version, "stop", ""
        )
        return Ref(sample, begins + length * TOKEN_SECONDS)

    def _prove(self, version: int, probes: Any) -> Ref:
        self._clock.charge("submit", self._costs.submit)
        return Ref(WorkerProof("worker", self.version, CHECKSUMS, (), ()))


class SimulatedRay:
    """The calls that the pool makes."""

    def __init__(self, clock: Clock, costs: Costs) -> None:
        self._clock, self._costs = clock, costs
        self.workers: list[Worker] = []

    def remote(self, kind: Any) -> Any:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self._recruit))

    def _recruit(self, *arguments: Any) -> Worker:
        self.workers.append(Worker(self._clock, self._costs))
        return self.workers[-1]

    def wait(
        self, refs: Sequence[Ref], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Ref], list[Ref]]:
        if timeout:
            self._clock.charge("wait", self._costs.wait * len(refs))
            first = min(ref.at for ref in refs)
            self._clock.skip(min(first - self._clock.now(), timeout))
        now = self._clock.now()
        ready = [ref for ref in refs if ref.at <= now][:num_returns]
        taken = set(map(id, ready))
        return ready, [ref for ref in refs if id(ref) not in taken]

    def get(self, ref: Ref) -> Any:
        if ref.at:
            self._clock.charge("get", self._costs.get)
        return ref.value

    def cancel(self, ref: Ref) -> None:
        """Nothing is in flight at the end of a step."""


class SimulatedRanks:
    """Learner ranks that take the time of their tokens, all at once, and what it takes to send them."""

    def __init__(self, clock: Clock, costs: Costs, world_size: int, workers: list[Worker]) -> None:
        self.world_size = world_size
        self._clock, self._costs, self._workers = clock, costs, workers

    def call(self, method: str, per_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        self._clock.charge("submit", self._costs.submit * self.world_size)
        match method:
            case "step":
                return self._step(per_rank)
            case "send_weights":
                for worker in self._workers:
                    worker.version = per_rank[0][0]
                # Rank 0 calls each worker four times, and each takes part in its own.
                self._clock.charge("sync", 4 * len(self._workers) * self._costs.submit)
                return [CHECKSUMS] * self.world_size
            case _:
                return [None] * self.world_size

    def _step(self, per_rank: Sequence[tuple[Any, ...]]) -> list[UpdateReport]:
        tokens = [sum(batch.num_tokens for batch in batches) for batches, *_ in per_rank]
        num_bytes = sum(batch_bytes(batch) for batches, *_ in per_rank for batch in batches)
        self._clock.charge("send batch", self._costs.byte * num_bytes)
        self._clock.reach(self._clock.now() + max(tokens) / TRAINED_TOKENS_PER_SECOND)
        return [UpdateReport(per_rank[0][1], 1.0, {"loss": 0.0}, 0.0)] * self.world_size

    def status(self) -> Sequence[Mapping[str, Any]]:
        return ()

    def close(self) -> None: ...


def batch_bytes(batch: Any) -> int:
    return sum(getattr(getattr(batch, name), "nbytes", 0) for name in batch.__slots__)


def measure_costs() -> Costs:
    """Of this machine's Ray, with one worker process that does nothing."""

    class Idle:
        def answer(self, value: Any) -> Any:
            return value

        def sleep(self) -> None:
            time.sleep(20)

    payload = Rollout("p/1", 0, tuple(range(512)), 0, (-1.0,) * 512, 0, "stop", "word " * 400)
    with ray_cluster():
        actor: Any = ray.remote(Idle).options(num_cpus=0, max_concurrency=64)
        idle, slow = actor.remote(), actor.remote()
        ray.get([idle.answer.remote(payload) for _ in range(100)])
        started = time.perf_counter()
        refs = [idle.answer.remote(payload) for _ in range(1000)]
        submit = (time.perf_counter() - started) / 1000
        ray.wait(refs, num_returns=len(refs))
        get = median(timed(lambda ref=ref: ray.get(ref)) for ref in refs)
        late = [slow.sleep.remote() for _ in range(4000)]
        wait = median(timed(lambda: ray.wait(late, timeout=0)) for _ in range(20)) / len(late)
        data = np.ones(50_000_000, np.uint8)
        byte = median(timed(lambda: ray.put(data)) for _ in range(5)) / data.nbytes
    return Costs(submit, get, wait, byte)


def timed(run: Any) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@contextmanager
def simulated(clock: Clock, sim: SimulatedRay, config: RolloutConfig) -> Iterator[pool.Pool]:
    """A pool of simulated workers, at whose steps the clock is looked at."""
    times = SimpleNamespace(monotonic=clock.now, perf_counter=clock.now, sleep=clock.skip)
    with (
        patch.object(pool, "ray", sim),
        patch.object(crew, "ray", sim),
        patch.object(crew, "kill_actor", lambda *arguments: None),
        closing(pool.Pool("none", config, dtype="float32", seed=0)) as workers,
    ):
        workers.wait_started()
        updates = clock.update_beside(loop.apply_updates)
        with clocked(times), patch.object(loop, "apply_updates", updates):
            yield workers


@contextmanager
def clocked(times: SimpleNamespace) -> Iterator[None]:
    with (
        patch.object(pool, "time", times),
        patch.object(metrics, "time", times),
        patch.object(loop, "time", times),
    ):
        yield


@dataclass(frozen=True)
class Size:
    """What one size of the simulated cluster took, in seconds a step."""

    workers: int
    ranks: int
    step: float
    bound: float
    phases: Mapping[str, float]
    spent: Mapping[str, float]

    def row(self) -> str:
        names = ("rollout", "update", "sync", "journal")
        phases = " | ".join(f"{self.phases.get(name, 0.0):.1f}" for name in names)
        share = sum(self.spent.values()) / self.step
        kinds = ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in sorted(self.spent.items()))
        return (
            f"| {self.workers} | {self.ranks} | {self.step:.1f} | {self.step / self.bound:.2f} | {phases} "
            f"| {share:.0%}: {kinds} |"
        )


def run_size(costs: Costs, num_workers: int, staleness: Literal[0, 1], folder: Path) -> Size:
    clock = Clock()
    sim = SimulatedRay(clock, costs)
    num_ranks = max(1, num_workers // WORKERS_PER_RANK)
    config = RolloutConfig(
        num_workers=num_workers,
        max_prompt_length=128,
        max_response_length=LONGEST,
        max_num_seqs=SLOTS,
    )
    with simulated(clock, sim, config) as workers:
        ranks: Any = SimulatedRanks(clock, costs, num_ranks, sim.workers)
        prompts = PROMPTS_PER_WORKER * num_workers
        run = idle_loop(folder, workers, ranks, prompts, staleness=staleness)
        clock.is_idle = lambda: run.parts.log.at.phase == "wait_for_update"
        try:
            run.step()
            clock.spent.clear()
            before, seconds, bounds = dict(run.parts.log.seconds), [], []
            for _ in range(STEPS):
                started = clock.now()
                for worker in sim.workers:
                    worker.drawn.clear()
                run.step()
                seconds.append(clock.now() - started)
                bounds.append(bound(sim.workers, num_ranks, staleness))
        finally:
            run.close()
    after = run.parts.log.seconds
    phases = {name: (after[name] - before.get(name, 0.0)) / STEPS for name in after}
    spent = {kind: total / STEPS for kind, total in clock.spent.items()}
    return Size(num_workers, num_ranks, median(seconds), median(bounds), phases, spent)


def bound(workers: Sequence[Worker], num_ranks: int, staleness: Literal[0, 1]) -> float:
    """Of a step whose samples keep all slots busy to the end, but for the longest one, and whose ranks are balanced."""
    lengths = [length for worker in workers for length in worker.drawn]
    slots = len(workers) * SLOTS
    sampling = TOKEN_SECONDS * max(sum(lengths) / slots, max(lengths))
    tokens = sum(lengths) + PROMPT_TOKENS * len(lengths)
    training = tokens / num_ranks / TRAINED_TOKENS_PER_SECOND
    return max(sampling, training) if staleness else sampling + training


HEAD = (
    "| workers | ranks | step, s | step / bound | rollout | update | sync | journal | driver in Ray calls, s |",
    "|" + "---|" * 9,
)


def main() -> None:
    costs = measure_costs()
    print(
        f"Ray here, microseconds: submit {1e6 * costs.submit:.0f}, get {1e6 * costs.get:.0f}, wait for one reference "
        f"{1e6 * costs.wait:.2f}, send {1e-9 / costs.byte:.2f} GB/s"
    )
    sizes = [int(text) for text in sys.argv[1:]] or SIZES
    modes: tuple[Literal[0, 1], ...] = (0, 1)
    for staleness in modes:
        print(f"\nloop.staleness: {staleness}\n", *HEAD, sep="\n", flush=True)
        for size in sizes:
            with TemporaryDirectory() as folder:
                print(run_size(costs, size, staleness, Path(folder)).row(), flush=True)


if __name__ == "__main__":
    main()
