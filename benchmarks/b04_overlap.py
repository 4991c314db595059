"""B4: how well sampling hides behind training, and training behind sampling, with `loop.staleness` 1.

The longer of the two over the step, both by the run's own metrics. The real loop, pool and journal around rollout
workers that sleep (each sample 0.5 to 1 of a time, by its seed) and a learner rank that sleeps, in several ratios of
the two; then steps of the quickstart recipe, where each half has a core.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from figures import at_least, at_most
from harness import Session
from idle_run import idle_loop, idle_pool, idle_ranks
from idle_workers import SECONDS, SPREAD, UPDATE_SECONDS
from plait.launch.cluster import ray_cluster
from quickstart_run import quickstart_steps

RATIOS = (0.5, 0.8, 1.0, 1.25, 2.0)
"""Training over sampling."""
SAMPLING_SECONDS = 0.8
PROMPTS, WORKERS, STEPS, WARM = 8, 2, 12, 3


def measure(session: Session) -> None:
    os.environ |= {SECONDS: str(SAMPLING_SECONDS), SPREAD: "0.5"}
    ratios, steps = ((1.0,), 5) if session.quick else (RATIOS, STEPS)
    oldest = 0.0
    with TemporaryDirectory() as folder, ray_cluster():
        for ratio in ratios:
            rows = idle_steps(Path(folder) / str(ratio), ratio, steps)
            oldest = max(oldest, *(row["staleness/max"] for row in rows))
            note = f"sampling {SAMPLING_SECONDS} s; medians: {medians(rows)}"
            name = f"training / sampling = {ratio:g}, sleeping workers"
            session.derive(name, efficiency(rows), target=at_least(0.95), note=note)
    if not session.quick:
        cores = ("learner.num_cpus=1", "rollouts.num_cpus=1")
        rows = quickstart_steps(8, "loop.staleness=1", "algorithm.sampler_ratio_cap=2.0", *cores)[
            1:
        ]
        oldest = max(oldest, *(row["staleness/max"] for row in rows))
        note = f"quickstart recipe, one core each; medians: {medians(rows)}"
        session.derive("real steps", efficiency(rows), target=at_least(0.90), note=note)
    session.count("oldest weights that a step was sampled from", oldest, target=at_most(1))


def idle_steps(folder: Path, ratio: float, steps: int) -> list[dict[str, Any]]:
    """Their metrics; the first ones are left out."""
    env = {UPDATE_SECONDS: str(ratio * SAMPLING_SECONDS)}
    with idle_ranks(env=env) as ranks, idle_pool(WORKERS) as pool:
        run = idle_loop(folder, pool, ranks, PROMPTS, staleness=1)
        try:
            for _ in range(WARM + steps):
                run.step()
        finally:
            run.close()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][WARM:]


def efficiency(rows: Sequence[Mapping[str, float]]) -> list[float]:
    return [max(row["time/rollout"], row["time/update"]) / row["time/step"] for row in rows]


def medians(rows: Sequence[Mapping[str, float]]) -> str:
    names = ("rollout", "update", "sync", "step")
    middle = {n: sorted(row[f"time/{n}"] for row in rows)[len(rows) // 2] for n in names}
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in middle.items())
