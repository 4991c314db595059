"""A small real run without Ray: the tiny model, DeepSpeed, an algorithm's state and a place in the data.

Processes are forked from one that has everything imported, so a run of a few steps takes about a second.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.engine.checkpoint import Checkpoints
from plait.engine.config import CheckpointConfig, LearnerConfig
from plait.engine.failpoints import VARIABLE
from plait.engine.run_state import RunState

STEPS = 4
SECONDS = 120.0


class Stream:
    """A place in data that never ends."""

    def __init__(self) -> None:
        self.taken = 0

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.taken = state["taken"]


def checkpoints_of(folder: Path, said: list[str] | None = None) -> Checkpoints:
    say = print if said is None else said.append
    return Checkpoints(folder, CheckpointConfig(keep=2), say=say)


def train(model: str, folder: Path, *, steps: int = STEPS, zero_stage: Any = 0) -> RunState:
    """From the last checkpoint to `steps`, with a checkpoint after every step and training going on meanwhile."""
    from rows import make_rows

    from plait.algorithms import Setup
    from plait.algorithms.chord import Chord, ChordConfig
    from plait.engine.batch import collate
    from plait.engine.learner import LearnerWorker, Rank
    from plait.engine.learners import InProcessRank, LearnerGroup
    from plait.engine.types import Sampling, Update

    algorithm = Chord(ChordConfig(), Setup(Sampling(16)))
    config = LearnerConfig(learning_rate=1e-2, zero_stage=zero_stage, num_cpus=1)
    worker = LearnerWorker(model, config, algorithm.losses, algorithm.needs, Rank())
    nowhere: Any = None
    learners = LearnerGroup(
        InProcessRank(worker), config, algorithm.needs, total_steps=STEPS, seed=0, route=nowhere
    )
    stream: Any = Stream()
    checkpoints = checkpoints_of(folder)
    state = checkpoints.restore(algorithm, stream, learners)
    while state.step < steps:
        assert stream.taken == state.step
        samples = tuple(make_rows("ppe", seed=stream.taken))
        update = Update(samples, "main", {"mu": 0.4})
        batch = learners.annotate(collate(samples), algorithm.needs["main"], single=True)
        state.advance(learners.update(batch, update, step=state.step))
        stream.taken += 1
        checkpoints.save(state, algorithm, stream, learners)
        checkpoints.settle(wait=False)
    checkpoints.settle(wait=True)
    return state


def start(model: Path, folder: Path, failpoint: str = "", **options: Any) -> Any:
    """`train` in a process of its own that is struck at `failpoint`."""
    # The server takes what it imports first from the environment, not from this process's path.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_run_imports"])
    process = context.Process(target=struck, args=(failpoint, str(model), folder), kwargs=options)
    process.start()
    return process


def struck(
    failpoint: str, model: str, folder: Path, limit: int = resource.RLIM_INFINITY, **options: Any
) -> None:
    """`limit`: bytes that a file may have."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars
    if failpoint:
        os.environ[VARIABLE] = failpoint
    train(model, folder, **options)


def exit_code(process: Any) -> int:
    process.join(SECONDS)
    assert process.exitcode is not None, f"no end within {SECONDS} s"
    return process.exitcode


def contents(checkpoints: Checkpoints) -> dict[int, str]:
    """Step -> digest of the learner's state, of every intact checkpoint."""
    found = {}
    for path in checkpoints.complete():
        manifest = checkpoints.verified(path).manifest
        (record,) = [file for file in manifest.files if file.path.startswith("learner/")]
        found[manifest.step] = record.sha256
    return found
