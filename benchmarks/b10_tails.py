"""B10: what the longest responses cost, in steps that are strictly on-policy.

The pool around workers that sleep: log-normal times, and one sample of 64 takes ten times the mean. The time of the
samples against the least that any schedule takes: all slots busy, or the longest sample alone. Every sample is trained
as it was drawn, so no token is discarded and no length preferred.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from figures import at_least, at_most
from harness import Session
from idle_run import GROUP_SIZE, SAMPLING, idle_pool
from idle_workers import SECONDS, TAIL, sample_seconds
from plait.engine.types import Prompt, RolloutRequest
from plait.launch.cluster import ray_cluster
from plait.rollouts.pool import Pool
from plait.rollouts.worker import sample_seed

MEAN_SECONDS, WORKERS, SLOTS = 0.2, 2, 16
"""A worker sleeps for as many samples at once as the pool gives it."""
PROMPTS = 64 // GROUP_SIZE


def measure(session: Session) -> None:
    os.environ |= {SECONDS: str(MEAN_SECONDS), TAIL: "1"}
    shares, lost = [], 0
    with ray_cluster(), idle_pool(WORKERS) as pool:
        for step in range(3 if session.quick else 20):
            asked = requests(step)
            started = time.perf_counter()
            drawn = list(pool.generate(asked, step=step))
            elapsed = time.perf_counter() - started
            lost += sum(request.n for request in asked) - len(drawn)
            shares.append(bound(pool, asked, step) / elapsed)
    session.derive(
        "least possible time / time of 64 samples, strictly on-policy",
        shares,
        target=at_least(0.90),
        note=f"{WORKERS} workers of {SLOTS} slots, mean {MEAN_SECONDS} s, one sample of {10 * MEAN_SECONDS:.0f} s",
    )
    session.count("samples discarded", lost, target=at_most(0))
    session.fail(
        "with over-sampling and partial rollouts",
        "plait has neither; loop.staleness 1 trains beside the tail instead (B4)",
        at_least(0.95),
    )


def requests(step: int) -> list[RolloutRequest]:
    prompts = [Prompt(f"{step}/{i}", (), (3, 4, 5)) for i in range(PROMPTS)]
    return [RolloutRequest(prompt, GROUP_SIZE, SAMPLING) for prompt in prompts]


def bound(pool: Pool, asked: Sequence[RolloutRequest], step: int) -> float:
    seconds = [
        sample_seconds(name, index, sample_seed(pool.seed, step, name, index))
        for name in (request.prompt.prompt_id for request in asked)
        for index in range(GROUP_SIZE)
    ]
    return max(sum(seconds) / (WORKERS * SLOTS), *seconds)
