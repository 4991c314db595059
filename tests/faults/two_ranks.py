"""What a rank's process does for test_not_finite.py: steps that are broken on one rank or all, between good ones."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from typing import Any

import torch
from rows import make_rows

from plait.algorithms import Setup
from plait.algorithms.chord import Chord, ChordConfig
from plait.engine.batch import collate, count, select
from plait.engine.config import LearnerConfig
from plait.engine.learner import LearnerWorker, Rank
from plait.engine.master_weights import inner_optimizer, master_weights
from plait.engine.packing import partition
from plait.engine.types import Sampling, TrainBatch

COEFS = {"mu": 0.4}
WAYS = ("loss on all ranks", "loss on rank 1", "gradient on rank 1", "gradient on all ranks")


class BrokenGradient(torch.autograd.Function):
    """The value as it is; its gradient is not a number."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * torch.nan


class Breaking:
    """A loss that is broken where `way` says so."""

    def __init__(self, loss: Any, rank: int) -> None:
        self.loss, self.rank, self.way = loss, rank, ""

    def __call__(self, out: Any, batch: Any, coefs: Any) -> Any:
        found = self.loss(out, batch, coefs)
        if not self.way or (self.way.endswith("rank 1") and self.rank != 1):
            return found
        broken = found.loss * torch.inf if self.way.startswith("loss") else found.loss
        return replace(found, loss=BrokenGradient.apply(broken))


def make_batch(seed: int = 0) -> TrainBatch:
    batch = collate(make_rows("ppephe", seed))
    column = torch.full((batch.num_tokens,), -5.7)
    batch = replace(batch, old_logprobs=column, ref_logprobs=column)
    return replace(batch, denom=count(batch))


def state_of(worker: LearnerWorker) -> str:
    """sha256 of every bit that an optimizer step may change on this rank."""
    found = hashlib.sha256()
    engine = worker.engine.deepspeed
    states = [inner_optimizer(engine).state, *worker.engine.moments._others.values()]
    # Under ZeRO-3 a parameter is its shard; what else of it is there depends on who asked last.
    parameters = [getattr(p, "ds_tensor", p) for p in worker.engine.module.parameters()]
    tensors = [*parameters, *master_weights(engine)]
    for state in states:
        for weight in master_weights(engine):
            own = state.get(weight, {})
            tensors += [torch.as_tensor(own[name]) for name in sorted(own)]
    for tensor in tensors:
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        found.update(bytes(raw.numpy().tobytes()) + str(tuple(tensor.shape)).encode())
    mask = worker.engine.mask
    found.update(str(None if mask is None else mask.steps).encode())
    return found.hexdigest()


def play(model: str, settings: dict[str, Any], rank: Rank) -> dict[str, Any]:
    """Two good steps with both sets of moments, then every broken one, then a good one."""
    algorithm = Chord(ChordConfig(entropy_coef=0.01), Setup(Sampling(16)))
    loss = Breaking(algorithm.losses["main"], rank.index)
    config = LearnerConfig(learning_rate=1e-2, **settings)
    worker = LearnerWorker(model, config, {"main": loss}, algorithm.needs, rank)

    def step(seed: int, optimizer: str) -> Any:
        batch = make_batch(seed)
        mine = partition(batch, rank.world_size, 40).plans[rank.index]
        parts = [select(batch, rows) for rows in mine]
        return worker.step(parts, "main", COEFS, 1e-2, optimizer)

    step(0, "main")
    step(1, "expert")
    before, skipped, after = state_of(worker), {}, {}
    for way in WAYS:
        loss.way = way
        skipped[way] = step(2, "expert" if "gradient" in way else "main").skipped
        after[way] = state_of(worker)
    loss.way = ""
    good = step(3, "main")
    logprobs = worker.logprobs([[5, 9, 200, 31, 7]])
    worker.close()
    return {
        "before": before,
        "skipped": skipped,
        "after": after,
        "good": (good.skipped, good.grad_norm),
        "logprobs": logprobs,
        "moved": state_of(worker) != before,
    }


def work(model: str, runs: list[dict[str, Any]], rank: Rank, answers: Any) -> None:
    os.dup2(2, 1)
    answers.put((rank.index, [play(model, settings, rank) for settings in runs]))
