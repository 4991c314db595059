"""How long a checkpoint holds up training, and how long it takes until it is committed.

    python benchmarks/bench_checkpoint.py MODEL --zero-stage 0 --saves 3

MODEL is a folder or a name that `plait model` knows. One learner rank in this process takes an optimizer step on random
rows between the saves, while the one before is being written. Held up: the time of `save` and of the commit, both in
the loop's thread. Bare steps are those during which nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from plait.algorithms import Setup
from plait.algorithms.sft import Sft, SftConfig
from plait.engine.batch import collate
from plait.engine.checkpoint import Checkpoints
from plait.engine.config import CheckpointConfig, LearnerConfig
from plait.engine.learner import LearnerWorker, Rank
from plait.engine.learners import InProcessRank, LearnerGroup
from plait.engine.run_state import RunState
from plait.engine.types import Sample, Sampling, Source, Update
from plait.launch.model import resolve_model

TOKENS = 256


class Nothing:
    def state_dict(self) -> dict[str, Any]:
        return {}


def learner_group(model: str, zero_stage: Any) -> LearnerGroup:
    algorithm = Sft(SftConfig(type="sft"), Setup(Sampling(TOKENS)))
    config = LearnerConfig(zero_stage=zero_stage, num_cpus=os.cpu_count() or 1)
    worker = LearnerWorker(resolve_model(model), config, algorithm.losses, algorithm.needs, Rank())
    route: Any = None
    ranks = InProcessRank(worker)
    return LearnerGroup(ranks, config, algorithm.needs, total_steps=99, seed=0, route=route)


def random_update() -> Update:
    dice = np.random.default_rng(0)
    source = np.full(TOKENS, Source.EXPERT)
    source[0] = Source.CONTEXT
    tokens = dice.integers(3, 250, TOKENS)
    zeros, ones = np.zeros(TOKENS), np.ones(TOKENS)
    sample = Sample(tokens, source, zeros, ones, np.full(TOKENS, np.nan), "r")
    return Update((sample,), "main", {})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--zero-stage", type=int, default=0)
    parser.add_argument("--saves", type=int, default=3)
    options = parser.parse_args()
    learners, update = learner_group(options.model, options.zero_stage), random_update()
    nothing: Any = Nothing()

    def step() -> float:
        started = time.perf_counter()
        learners.update(collate(update.samples), update, step=0)
        return time.perf_counter() - started

    step()
    rows = []
    with TemporaryDirectory(dir=Path.cwd()) as folder:
        checkpoints = Checkpoints(Path(folder), CheckpointConfig())
        for number in range(1, options.saves + 1):
            bare = step()
            started = time.perf_counter()
            checkpoints.save(RunState(step=number), nothing, nothing, learners)
            snapshot = time.perf_counter() - started
            beside = []
            while learners.saved(wait=False) is None:
                beside.append(step())
            written = time.perf_counter() - started
            committing = time.perf_counter()
            checkpoints.settle(wait=True)
            commit = time.perf_counter() - committing
            (file,) = (checkpoints.complete()[-1] / "learner").iterdir()
            started = time.perf_counter()
            checkpoints.latest()
            rows.append(
                {
                    "megabytes": round(file.stat().st_size / 1e6, 1),
                    "held_up_seconds": round(snapshot + commit, 3),
                    "written_after_seconds": round(written, 3),
                    "steps_meanwhile": len(beside),
                    "step_seconds": round(bare, 3),
                    "step_seconds_meanwhile": round(sum(beside) / len(beside), 3)
                    if beside
                    else None,
                    "verify_seconds": round(time.perf_counter() - started, 3),
                }
            )
    print(
        json.dumps(
            {"model": options.model, "zero_stage": options.zero_stage, "saves": rows}, indent=1
        )
    )


if __name__ == "__main__":
    print("one learner rank in this process", file=sys.stderr)
    main()
