"""B12: how much of the pool's processes scoring uses, and what hostile samples cost the others.

Efficiency is verified samples/s of the pool over (processes / time of one call in this process), on samples that
neither side has seen: math-verify and sympy answer a known one from their caches in a third of the time, and here one
process would know all of them, there each process half. For latency, samples arrive evenly, once all of them healthy,
once with 1 % that hang, eat memory, raise BaseException, exit or start processes, at a pace at which hanging calls
would keep a quarter of the processes busy; latency is from arrival to score.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from figures import at_least, at_most
from harness import Session, Side, Work, cost
from plait.engine.types import Prompt, Score
from plait.rewards.config import RewardConfig
from plait.rewards.frames import RewardSource
from plait.rewards.groups import pickled
from plait.rewards.math import grade_math
from plait.rewards.pool import Job, ProcessPool

HOSTILE = ("hang", "memory", "rude", "exit", "spawn")
FUNCTION = """
import os, subprocess, sys, time
from plait.rewards.math import grade_math

class Rude(BaseException):
    pass

def grade(prompt, completion):
    if completion == "hang":
        while True:
            pass
    if completion == "memory":
        return float(len(bytearray(10 << 30)))
    if completion == "rude":
        raise Rude("no")
    if completion == "exit":
        sys.exit(3)
    if completion == "spawn":
        subprocess.Popen(["sleep", "600"])
        time.sleep(600)
    return grade_math(prompt, completion)
"""


@dataclass(frozen=True)
class Item:
    prompt: Prompt
    completion: str

    @property
    def hostile(self) -> bool:
        return self.completion in HOSTILE


@dataclass(frozen=True)
class Scored:
    item: Item
    score: Score
    seconds: float


def math_items(count: int, seed: int = 0) -> list[Item]:
    """Short solutions with a boxed fraction; every third one is wrong."""
    rng = np.random.default_rng(seed)
    items = []
    for i in range(count):
        a, b, c = (int(n) for n in rng.integers(2, 99, size=3))
        prompt = Prompt(f"p{i}", (), (), answer=rf"\frac{{{a}}}{{{b}}} + {c}")
        value = rf"\frac{{{a + b * c}}}{{{b}}}" if i % 3 else str(c)
        text = f"We add {c} to {a}/{b}, which has the common denominator {b}. " * 4
        items.append(Item(prompt, f"{text} The result is \\boxed{{{value}}}."))
    return items


def planted(items: Sequence[Item], every: int = 100) -> list[Item]:
    """The same with each `every`-th sample hostile."""
    return [
        Item(item.prompt, HOSTILE[i // every % len(HOSTILE)]) if i % every == every // 2 else item
        for i, item in enumerate(items)
    ]


def open_pool(
    folder: Path, workers: int, timeout_seconds: float
) -> tuple[ProcessPool, RewardSource]:
    (folder / "bench_reward_functions.py").write_text(FUNCTION)
    config = RewardConfig(
        function="bench_reward_functions:grade",
        num_workers=workers,
        timeout_seconds=timeout_seconds,
    )
    source = RewardSource(config.function, "reward.function")
    pool = ProcessPool(config, [source], str(folder))
    pool.wait_ready()
    return pool, source


def run_load(
    pool: ProcessPool, source: RewardSource, items: Sequence[Item], interval: float
) -> list[Scored]:
    """Hand over one item each `interval` seconds and wait for all scores. Raises TimeoutError after 120 s."""
    scored: dict[int, Scored] = {}
    changed = threading.Condition()

    def submit(number: int, item: Item) -> None:
        arrived = time.perf_counter()

        def done(score: Score) -> None:
            with changed:
                scored[number] = Scored(item, score, time.perf_counter() - arrived)
                if len(scored) == len(items):
                    changed.notify()

        def fail(error: Exception) -> None:
            raise error

        data = pickled(item.prompt)
        pool.submit(Job(source, data, item.completion, done, fail, lambda: True))

    started = time.perf_counter()
    for number, item in enumerate(items):
        time.sleep(max(0.0, started + number * interval - time.perf_counter()))
        submit(number, item)
    with changed:
        if not changed.wait_for(lambda: len(scored) == len(items), timeout=120):
            raise TimeoutError(f"{len(items) - len(scored)} of {len(items)} samples have no score")
    return [scored[number] for number in range(len(items))]


def p99(results: Sequence[Scored]) -> float:
    """Of the healthy samples, in seconds."""
    return float(np.percentile([r.seconds for r in results if not r.item.hostile], 99))


def single_call(items: Sequence[Item]) -> float:
    """Seconds of one call in this process."""
    started = time.perf_counter()
    for item in items:
        grade_math(item.prompt, item.completion)
    return (time.perf_counter() - started) / len(items)


def answered(items: Sequence[Item]) -> Work:
    """The healthy samples: a digest of what was graded."""
    return Work.of([list(item.completion.encode()) for item in items if not item.hostile])


SAMPLES = 512
TIMEOUT = 1.0
"""Seconds a call may take."""


def measure(session: Session) -> None:
    workers = os.cpu_count() or 1
    with TemporaryDirectory() as folder:
        pool, source = open_pool(Path(folder), workers, TIMEOUT)
        try:
            measure_efficiency(session, pool, source, workers)
            measure_latency(session, pool, source, workers)
        finally:
            pool.close()


def measure_efficiency(
    session: Session, pool: ProcessPool, source: RewardSource, workers: int
) -> None:
    def alone(items: list[Item]) -> list[Item]:
        for item in items:
            grade_math(item.prompt, item.completion)
        return items

    def pooled(items: list[Item]) -> list[Item]:
        return [scored.item for scored in run_load(pool, source, items, 0.0)]

    def side(name: str, run: Callable[[list[Item]], list[Item]]) -> Side:
        return Side(
            name,
            run,
            lambda given, result: answered(result),
            lambda number: math_items(SAMPLES, seed=2 + number),
        )

    session.compare(
        "samples/s of the pool / (processes / time of one call)",
        side("one call after the other", alone),
        side("pool", pooled),
        target=at_least(0.9),
        value=lambda one, many: one / many / workers,
        limit=1.0,
        seconds=110,
        note=f"{workers} processes, {SAMPLES} answers a run",
    )


def measure_latency(
    session: Session, pool: ProcessPool, source: RewardSource, workers: int
) -> None:
    pace = 0.01 * TIMEOUT / (0.25 * workers)
    items = math_items(SAMPLES // 2, seed=0)

    def side(name: str, load: list[Item]) -> Side:
        return Side(
            name,
            lambda number: run_load(pool, source, load, pace),
            lambda given, results: answered([r.item for r in results if r.item in kept]),
            took=p99,
        )

    hostile = planted(items)
    kept = [item for item in hostile if not item.hostile]
    session.compare(
        "p99 of healthy samples, 1 % hostile / none",
        side("healthy", items),
        side("hostile", hostile),
        target=at_most(2.0),
        value=cost,
        seconds=150,
        control=0.25,
        note=f"A/A within 25 %: the p99 of {len(items)} samples is no finer",
    )
