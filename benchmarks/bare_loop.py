"""The least that PyTorch needs to train: a model, a loss, AdamW. What plait's learner is measured against.

It has the learner's attention over packed rows, its LM head on trained positions, its loss, and micro-batches that are
cut already; it leaves out what a bare loop may: nothing is annotated, checked, sent, reported but the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.algorithms import Setup
from plait.algorithms.grpo import Grpo, GrpoConfig
from plait.engine.attention import SEGMENTS, hidden_states
from plait.engine.batch import collate, select
from plait.engine.config import LearnerConfig
from plait.engine.head_statistics import head_statistics
from plait.engine.packing import partition
from plait.engine.types import PolicyOutput, Sample, Sampling, TrainBatch

ALGORITHM = Grpo(GrpoConfig(), Setup(Sampling(1024)))
"""Whose loss both sides compute."""
CHUNK = LearnerConfig().logit_chunk_tokens


def cut(samples: Sequence[Sample], max_tokens: int, ranks: int = 1) -> list[list[TrainBatch]]:
    """Packed micro-batches of one optimizer step, for each rank."""
    batch = collate(samples)
    plans = partition(batch, ranks, max_tokens).plans
    return [[select(batch, rows) for rows in plan] for plan in plans]


class Policy(nn.Module):
    """Packed rows -> the loss."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=SEGMENTS
        )

    def forward(self, batch: TrainBatch) -> Tensor:
        targets = batch.trained.nonzero().squeeze(-1)
        hidden = hidden_states(self.model.base_model, batch, targets - 1, packing=True)
        logprobs, _ = head_statistics(
            hidden,
            self.model.get_output_embeddings().weight,
            batch.targets[targets],
            softcap=None,
            chunk_tokens=CHUNK,
            entropy=False,
        )
        column = logprobs.new_zeros(batch.num_tokens).index_copy(0, targets, logprobs)
        on_policy = replace(batch, old_logprobs=column.detach())
        return ALGORITHM.losses["main"](PolicyOutput(column), on_policy, {}).loss


class BareLoop:
    """One process; with `distributed`, one of the ranks of a process group, under DistributedDataParallel."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        *,
        rate: float = 1e-6,
        distributed: bool = False,
    ) -> None:
        """bfloat16 weights have float32 master weights, as in the learner."""
        self.policy: nn.Module = Policy(folder, dtype).train()
        self.world_size = 1
        if distributed:
            self.policy = nn.parallel.DistributedDataParallel(self.policy)
            self.world_size = torch.distributed.get_world_size()
        self.weights: list[Tensor] = list(self.policy.parameters())
        self.masters = self.weights
        if dtype != torch.float32:
            self.masters = [w.detach().float().requires_grad_() for w in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=rate, fused=True)

    def step(self, micro_batches: Sequence[TrainBatch]) -> float:
        """One optimizer step; the loss."""
        total = 0.0
        for i, batch in enumerate(micro_batches):
            waits = self.world_size > 1 and i < len(micro_batches) - 1
            policy: Any = self.policy
            with policy.no_sync() if waits else nullcontext():
                loss = policy(batch)
                (loss * self.world_size).backward()  # gradients are averaged over ranks
            total += float(loss.detach())
        self._apply()
        return total

    def _apply(self) -> None:
        if self.masters is not self.weights:
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masters is not self.weights:
            with torch.no_grad():
                for weight, master in zip(self.weights, self.masters, strict=True):
                    weight.copy_(master)
            self.policy.zero_grad()
