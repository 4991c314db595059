"""B5: what a step costs beside the work of its workers, and how fast a batch reaches the learner.

Steps of the real loop with rollout workers and a learner rank that are real Ray actors and compute nothing: 8 prompts
of 4 samples, journal, metrics, weight sync with its proof. So the whole step is overhead.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from figures import at_least, at_most
from harness import Session
from idle_run import idle_ranks, step_seconds
from plait.engine.batch import collate
from plait.engine.ray_ranks import RayRanks
from plait.launch.cluster import ray_cluster
from quickstart_run import quickstart_steps, share_of_steps
from shapes import make_groups

WORKERS = (1, 2, 8, 32)
PROMPTS, STEPS = 8, 40


def measure(session: Session) -> None:
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder, ray_cluster(), idle_ranks() as ranks:
        measure_data_plane(session, ranks)
        measure_steps(session, Path(folder), ranks)
    if session.quick:
        return
    shares = share_of_steps(quickstart_steps(5), "control")
    note = "SmolLM2-135M, quickstart recipe: all but rollout, update and sync"
    session.derive("share of a real step", shares, target=at_most(0.02), note=note)


def measure_steps(session: Session, folder: Path, ranks: RayRanks) -> None:
    workers, steps = ((1, 2), 5) if session.quick else (WORKERS, STEPS)
    seconds = {n: step_seconds(folder, ranks, n, PROMPTS, steps) for n in workers}
    medians = ", ".join(f"{n}: {1000 * np.median(s):.1f}" for n, s in seconds.items())
    two = [1000 * s for s in seconds[2]]
    note = f"{PROMPTS} prompts of 4 samples; ms a step by workers: {medians}"
    session.derive("p50 of a step, 2 idle workers", two, target=at_most(20), unit="ms", note=note)
    session.count("p99 of a step, 2 idle workers", float(np.percentile(two, 99)), unit="ms")
    slopes = [
        1000 * float(np.polyfit(workers, [seconds[n][i] for n in workers], 1)[0])
        for i in range(steps)
    ]
    name = f"more for each worker, {workers[0]} to {workers[-1]}"
    session.derive(name, slopes, target=at_most(1.0), unit="ms")


def measure_data_plane(session: Session, ranks: RayRanks) -> None:
    rows = make_groups(0, num_prompts=64, group_size=16, prompt_tokens=512, lengths=[512])
    batch = collate(rows)
    tensors = (getattr(batch, name) for name in batch.__slots__)
    num_bytes = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
    clock = session.clock

    def send(number: int) -> float:
        started = clock.now()
        (report,) = ranks.call("step", [([batch], "main", {}, 0.0, "main")])
        seconds = clock.now() - started
        assert report.metrics["seen"] == batch.num_tokens
        return num_bytes / seconds / 1e9

    session.sample(
        "driver to learner",
        send,
        seconds=60,
        target=at_least(1.0),
        unit="GB/s",
        note=f"one micro-batch of {num_bytes / 1e6:.0f} MB, until its rank has counted the tokens and answered",
    )
