"""B12: how much of the pool's processes scoring uses, and what hostile samples cost the others.

    python benchmarks/bench_rewards.py --pairs 12

Efficiency is verified samples/s of the pool over (processes / time of one call in this process), measured in turns
(A B B A) on samples that neither side has seen: math-verify and sympy answer a known one from their caches in a third
of the time, and here one process would know all of them, there each process half. For latency, samples arrive evenly,
once all of them healthy, once with 1 % that hang, eat memory, raise BaseException, exit or start processes, at a pace
at which hanging calls would keep a quarter of the processes busy; latency is from arrival to score.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

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
    started = time.perf_counter()
    for item in items:
        grade_math(item.prompt, item.completion)
    return (time.perf_counter() - started) / len(items)


def pool_rate(pool: ProcessPool, source: RewardSource, items: Sequence[Item]) -> float:
    started = time.perf_counter()
    run_load(pool, source, items, 0.0)
    return len(items) / (time.perf_counter() - started)


def interval95(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Median and its bootstrap 95 % interval."""
    rng = np.random.default_rng(seed)
    medians = np.median(rng.choice(values, size=(4000, len(values))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return statistics.median(values), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds a call may take")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        pool, source = open_pool(Path(folder), args.workers, args.timeout)
        single_call(math_items(64))  # imports and first calls, here and in the pool
        pool_rate(pool, source, math_items(args.samples))
        ratios, controls, latencies, calls = [], [], [], []
        for pair in range(args.pairs):
            items = math_items(args.samples, seed=1 + 2 * pair)
            if pair % 2:
                rate, one = pool_rate(pool, source, items), single_call(items)
            else:
                one, rate = single_call(items), pool_rate(pool, source, items)
            ratios.append(rate * one / args.workers)
            calls.append(one)
            controls.append(single_call(math_items(args.samples, seed=2 + 2 * pair)) / one)
        pace = 0.01 * args.timeout / (0.25 * args.workers)
        others = math_items(args.samples, seed=1000)
        for pair in range(max(args.pairs // 2, 1)):
            order = (others, planted(others)) if pair % 2 else (planted(others), others)
            runs = {load is others: run_load(pool, source, load, pace) for load in order}
            latencies.append(p99(runs[False]) / p99(runs[True]))
        pool.close()
    report = {
        "processes": args.workers,
        "one_call_ms": 1000 * statistics.median(calls),
        "efficiency": interval95(ratios),
        "control": interval95(controls),
        "p99_ratio": interval95(latencies),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
