"""Rollout workers without vLLM: real Ray actors with the real worker's states, around an engine that only computes.

A "model" is the bytes of its parameters. What the engine draws is a digest of all parameters that it holds and the
seed, so a sample drawn from mixed weights shows.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from plait.engine.failpoints import VARIABLE, reach
from plait.engine.types import Prompt, Rollout, RolloutRequest, Sampling
from plait.engine.weight_sync import checksum
from plait.rollouts.config import RolloutConfig
from plait.rollouts.worker import RolloutWorker, SampleTask, WorkerProof

CONFIG = RolloutConfig(
    max_prompt_length=16,
    max_response_length=16,
    max_num_seqs=4,
    num_workers=2,
    silence_seconds=2.0,
    start_timeout_seconds=60.0,
    sample_timeout_seconds=20.0,
    sync_timeout_seconds=20.0,
)
SECONDS = "PLAIT_TEST_SAMPLE_SECONDS"
"""Environment variable: how long a sample takes."""
FAILPOINTS = "PLAIT_TEST_FAILPOINTS"
"""Environment variable, `rollout-1=kill:stub.bucket:2,...`: failpoints of single workers."""
NUM_PARAMETERS = 5


def make_weights(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {f"layer.{i}": torch.randn(64, generator=generator) for i in range(NUM_PARAMETERS)}


def draw(weights: Mapping[str, torch.Tensor], seed: int, n: int) -> tuple[int, ...]:
    """The tokens that these weights, all of one version, draw."""
    parts = [f"{name} {checksum(weights[name])}" for name in sorted(weights)]
    key = "\n".join([*parts, str(seed)]).encode()
    return tuple(hashlib.blake2b(key, digest_size=n).digest())


def requests(num_prompts: int = 8, n: int = 4) -> list[RolloutRequest]:
    prompts = [Prompt(f"p/{i}", (), (3, 4, i)) for i in range(num_prompts)]
    return [RolloutRequest(prompt, n, Sampling(8)) for prompt in prompts]


class StubEngine:
    """What RolloutWorker calls of vLLM's AsyncLLM."""

    errored = False

    def __init__(self) -> None:
        self.weights = make_weights(0)
        self.fresh = False
        """An update has begun that brings all parameters, whatever their names."""

    async def collective_rpc(self, method: str) -> Any:
        if method == "beat":
            return None
        sums = {name: checksum(weight) for name, weight in self.weights.items()}
        return [{"checksums": sums, "stale": []}]

    async def start_weight_update(self) -> None:
        self.fresh = True
        reach("stub.start")

    async def finish_weight_update(self, version: str) -> None:
        reach("stub.finish")

    def load(self, info: Mapping[str, Any]) -> None:
        """One parameter, a bucket, after the other."""
        if self.fresh and set(info["names"]) != set(self.weights):
            self.weights = {}
        self.fresh = False
        raw = torch.from_file(
            info["path"], size=os.stat(info["path"]).st_size, dtype=torch.uint8, shared=False
        )
        for name, shape, offset in zip(info["names"], info["shapes"], info["offsets"], strict=True):
            size = 4 * torch.Size(shape).numel()
            self.weights[name] = raw[offset : offset + size].view(torch.float32).view(shape).clone()
            reach("stub.bucket")


class StubWorker(RolloutWorker):
    async def start(self) -> None:
        for entry in filter(None, os.environ.get(FAILPOINTS, "").split(",")):
            name, _, point = entry.partition("=")
            if name == self._name:
                os.environ[VARIABLE] = point
        reach("stub.starts")
        self._engine = StubEngine()
        self._refusal = ""

    async def generate(self, task: SampleTask) -> Rollout:
        with self._drawing():
            version = self._version
            reach("stub.draws")
            await asyncio.sleep(float(os.environ.get(SECONDS, "0.05")))
            tokens = draw(self._engine.weights, task.seed, task.sampling.max_tokens)
        return Rollout(
            task.prompt_id, task.index, tokens, 0, (-1.0,) * len(tokens), version, "length", ""
        )

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        pass

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        self._engine.load(update_info)

    async def prove(self, version: int, probes: Sequence[Sequence[int]]) -> WorkerProof:
        return await super().prove(version, ())
