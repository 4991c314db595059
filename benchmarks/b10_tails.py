"""B10: what the longest responses cost.

The pool around workers that sleep: log-normal times, and one sample of 64 takes ten times the mean. Strictly on-policy,
the time of a step's samples stands against the least that any schedule takes: all slots busy, or the longest sample
alone. With over-sampling (loop.extra_prompts) the longest goes on in later steps, so the bound is that of all slots
busy, and the time that of the loop's rollout phase, in which samples are interrupted and given out again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from figures import at_least, at_most
from harness import Session
from idle_run import GROUP_SIZE, SAMPLING, ParityScorer, Stream, idle_loop, idle_pool, idle_ranks
from idle_workers import RESPONSE, SECONDS, TAIL, sample_seconds
from plait.engine.over_sampling import Carried
from plait.engine.types import Prompt, RolloutRequest
from plait.launch.cluster import ray_cluster
from plait.rollouts.pool import Pool

MEAN_SECONDS, WORKERS, SLOTS = 0.4, 2, 16
"""A worker sleeps for as many samples at once as the pool gives it."""
PROMPTS = 64 // GROUP_SIZE
EXTRA = 16
"""Prompts; their samples keep the slots busy to the end of a step."""
BLOCK = 3
"""Steps that are taken together: what one begins another one finishes."""


def measure(session: Session) -> None:
    os.environ |= {SECONDS: str(MEAN_SECONDS), TAIL: "1"}
    with ray_cluster(), idle_pool(WORKERS) as pool, idle_ranks() as ranks:
        measure_strict(session, pool)
        with TemporaryDirectory() as folder:
            measure_over_sampled(session, pool, ranks, Path(folder))


def measure_strict(session: Session, pool: Pool) -> None:
    shares, lost = [], 0
    for step in range(3 if session.quick else 8):
        asked = requests(step)
        started = time.perf_counter()
        drawn = list(pool.generate(asked, step=step))
        elapsed = time.perf_counter() - started
        lost += sum(request.n for request in asked) - len(drawn)
        seconds = seconds_of([request.prompt.prompt_id for request in asked])
        shares.append(max(sum(seconds) / (WORKERS * SLOTS), *seconds) / elapsed)
    session.derive(
        "least possible time / time of 64 samples, strictly on-policy",
        shares,
        target=at_least(0.90),
        note=f"{WORKERS} workers of {SLOTS} slots, mean {MEAN_SECONDS} s, one sample of {10 * MEAN_SECONDS:.0f} s",
    )
    session.count("samples discarded, strictly on-policy", lost, target=at_most(0))


def measure_over_sampled(session: Session, pool: Pool, ranks: Any, folder: Path) -> None:
    run = idle_loop(folder, pool, ranks, PROMPTS, extra_prompts=EXTRA)
    scorer, data = run.parts.scorer, run.parts.data
    assert isinstance(scorer, ParityScorer)
    assert isinstance(data, Stream)
    shares, lengths, tokens, discarded = [], [], 0, 0.0
    try:
        for _ in range(3):
            run.step()
        for _ in range(2 if session.quick else 10):
            before, work = run.parts.log.seconds["rollout"], -in_hand(run.state.carried)
            for _ in range(BLOCK):
                run.step()
                seconds = seconds_of([group.prompt.prompt_id for group in scorer.last])
                lengths += seconds
                work += sum(seconds)
                tokens += sum(len(r.token_ids) for group in scorer.last for r in group.rollouts)
            work += in_hand(run.state.carried)
            shares.append(work / (WORKERS * SLOTS) / (run.parts.log.seconds["rollout"] - before))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        discarded = sum(row["rollouts/discarded_tokens"] for row in rows)
        population = seconds_of([f"p/{i}" for i in range(data.position)])
    finally:
        run.close()
    session.derive(
        f"work kept / (slots x time), {EXTRA} prompts beyond {PROMPTS}, partial rollouts",
        shares,
        target=at_least(0.95),
        note=f"of {BLOCK} steps each, trained or carried on; oldest sample {max(ages(rows)):.0f} updates old",
    )
    session.count("sampled tokens discarded / trained", discarded / tokens, target=at_most(0.02))
    bias = fmean(lengths) / fmean(population)
    error = float(np.std(population)) / len(lengths) ** 0.5 / fmean(population)
    session.count(
        "mean length of trained samples / of all that were drawn",
        bias,
        note=f"standard error {error:.3f}; every prompt is trained once",
    )


def in_hand(carried: Carried) -> float:
    """Seconds of work in what is sampled of the prompts that wait."""
    return sum(
        len(one.logprobs) / RESPONSE * sample_seconds(one.prompt_id, one.index, 0)
        for one in carried.rollouts
    )


def ages(rows: Sequence[dict[str, float]]) -> list[float]:
    return [row.get("staleness/max", 0.0) for row in rows]


def requests(step: int) -> list[RolloutRequest]:
    prompts = [Prompt(f"{step}/{i}", (), (3, 4, 5)) for i in range(PROMPTS)]
    return [RolloutRequest(prompt, GROUP_SIZE, SAMPLING) for prompt in prompts]


def seconds_of(prompt_ids: Sequence[str]) -> list[float]:
    """Of all samples of these prompts."""
    return [sample_seconds(name, index, 0) for name in prompt_ids for index in range(GROUP_SIZE)]
