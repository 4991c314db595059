"""Rollout workers and learner ranks that compute nothing: real Ray actors, so that what is left is the engine's own.

A sample takes SECONDS of the environment, all the same, for the longest of many would grow with their number; by its
seed up to the part SPREAD less; or, with TAIL, a log-normal part of it, whichever step draws it. Sleeping uses no CPU,
so that many workers fit a small machine and do not disturb each other.
"""

from __future__ import annotations

import asyncio
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from plait.engine.processes import die_with_parent
from plait.engine.ray_ranks import RemoteLearner
from plait.engine.types import Rollout
from plait.rollouts.worker import RolloutWorker, SampleTask, WorkerProof

SECONDS = "PLAIT_BENCH_SAMPLE_SECONDS"
SPREAD = "PLAIT_BENCH_SAMPLE_SPREAD"
TAIL = "PLAIT_BENCH_SAMPLE_TAIL"
UPDATE_SECONDS = "PLAIT_BENCH_UPDATE_SECONDS"
"""Of a learner's rank, for each optimizer step."""
RESPONSE = 64
CHECKSUMS = {"weight": "0"}


def sample_seconds(prompt_id: str, index: int, seed: int) -> float:
    """How long a worker sleeps; with TAIL, the third sample of each 16th prompt takes ten times the mean."""
    mean = float(os.environ.get(SECONDS, "0"))
    if TAIL not in os.environ:
        draw = np.random.default_rng([seed, 1])
        return mean * (1 - float(os.environ.get(SPREAD, "0")) * draw.random())
    draw = np.random.default_rng([zlib.crc32(prompt_id.encode()), index])
    is_outlier = int(prompt_id.rpartition("/")[2]) % 16 == 5 and index == 2
    return mean * (10.0 if is_outlier else float(draw.lognormal(-0.125, 0.5)))


class IdleWorker(RolloutWorker):
    async def start(self) -> None:
        die_with_parent()
        self._refusal = ""
        self._interrupted = asyncio.Event()

    async def beat(self) -> None:
        """There is no process behind this one."""

    async def generate(self, task: SampleTask) -> Rollout:
        begun = () if task.begun is None else task.begun.token_ids
        total = sample_seconds(task.prompt_id, task.index, task.seed)
        left = total * (1 - len(begun) / RESPONSE)
        started, version = time.monotonic(), self._version
        with suppress(TimeoutError):
            await asyncio.wait_for(self._interrupted.wait(), left)
        share = min(1.0, (time.monotonic() - started) / left) if left else 1.0
        length = round(share * (RESPONSE - len(begun)))
        drawn = np.random.default_rng(task.seed).integers(3, 300, length).tolist()
        tokens = (*begun, *drawn)
        end = "length" if len(tokens) == RESPONSE else "abort"
        logprobs = (-1.0,) * len(tokens)
        return Rollout(task.prompt_id, task.index, tokens, 0, logprobs, version, end, "")

    async def interrupt(self) -> None:
        self._interrupted.set()
        self._interrupted = asyncio.Event()

    async def prove(self, version: int, probes: Sequence[Sequence[int]]) -> WorkerProof:
        return WorkerProof(self._name, self._version, CHECKSUMS, (), ())

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Nothing to agree on."""

    async def start_weight_update(self) -> None:
        """No weights."""

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """No weights."""

    async def finish_weight_update(self, weight_version: str) -> None:
        self._version = int(weight_version)


class IdleRank:
    """The methods of LearnerWorker that a step calls."""

    def __init__(self) -> None:
        self.sender: Any = None

    def step(self, micro_batches: Sequence[Any], loss: str, *_: Any) -> Any:
        from plait.engine.types import UpdateReport

        time.sleep(float(os.environ.get(UPDATE_SECONDS, "0")))
        tokens = sum(batch.num_tokens for batch in micro_batches)
        return UpdateReport(loss, 1.0, {"loss": 0.0, "seen": float(tokens)}, 0.0)

    def connect(self, receivers: Sequence[Any], route: Any) -> None:
        import torch

        from plait.engine.weight_sync import make_sender

        self.sender = make_sender(
            route.kind, rank=0, dtype=torch.float32, timeout_seconds=route.timeout_seconds
        )
        self.sender.connect(receivers)

    def send_weights(self, version: int) -> Mapping[str, str]:
        import torch

        self.sender.send(lambda: [("weight", torch.zeros(16))], version)
        return CHECKSUMS

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return []

    def close(self) -> None:
        if self.sender is not None:
            self.sender.close()


class IdleLearner(RemoteLearner):
    def start(self, *args: Any) -> None:
        worker: Any = IdleRank()
        self.worker = worker
