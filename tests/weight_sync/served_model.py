"""A tiny model on the learner's side and the worker that serves it, for tests with a real vLLM engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.engine.types import Prompt, RolloutRequest, Sampling
from plait.rollouts.config import RolloutConfig
from plait.rollouts.weight_transfer import WeightSyncExtension
from plait.rollouts.worker import RolloutWorker
from tiny_model import Family, make_tiny_model

CONFIG = RolloutConfig(
    max_prompt_length=64,
    max_response_length=64,
    kv_cache_gib=0.25,
    max_num_seqs=8,
    start_timeout_seconds=300,
    sample_timeout_seconds=120,
    sync_timeout_seconds=120,
)
PROMPT = Prompt("sums/0", (), tuple(range(5, 20)))
PROBES = [tuple(range(3, 40)), tuple(range(200, 230))]


def write_model(folder: Path, family: Family, *, tied: bool, vocab_size: int = 320) -> str:
    """vLLM's CPU attention knows head sizes from 32 up, hence two heads."""
    return str(
        make_tiny_model(folder, family, tied=tied, vocab_size=vocab_size, heads=2, kv_heads=1)
    )


class LocalLearner:
    """The policy in this process: what contracts.Learners.logprobs and `Weights` need, by transformers."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def weights(self) -> Any:
        return self.model.named_parameters()

    @torch.no_grad()
    def step(self, seed: int, size: float = 0.02) -> None:
        """Change every parameter a little."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)

    @torch.no_grad()
    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return [self._logprobs(torch.tensor(list(sequence))) for sequence in sequences]

    def _logprobs(self, tokens: Tensor) -> list[float]:
        scores = self.model(tokens[None]).logits[0].log_softmax(-1)
        return scores[:-1].gather(1, tokens[1:, None])[:, 0].tolist()


def request(n: int, *, max_tokens: int = 12, prefix: tuple[int, ...] = ()) -> RolloutRequest:
    return RolloutRequest(PROMPT, n, Sampling(max_tokens), prefix)


class ForgetfulExtension(WeightSyncExtension):
    """Lives in vLLM's process."""

    def forget_tied_heads(self) -> None:
        from plait.rollouts import weight_transfer

        weight_transfer.dispatch_cpu_unquantized_gemm = lambda *_, **__: None


class ForgetfulWorker(RolloutWorker):
    """A worker whose tied head keeps its old packed copy, which is what vLLM does on a CPU by itself."""

    async def start(self) -> None:
        from plait.rollouts import worker

        ours = worker.engine_args
        extension = f"{__name__}.{ForgetfulExtension.__name__}"
        worker.engine_args = lambda *args: ours(*args) | {"worker_extension_cls": extension}
        await super().start()
        await self._engine.collective_rpc("forget_tied_heads")
