"""Proof that a vLLM model computes with the weights it received, and not with an older packed copy.

While weights stream in, `ReceivedWeights` notes of every parameter its checksum and what a correct layer must answer
to a few probe inputs. `stale` then asks the *served* modules, fused and packed as they are, for their answers:

* one-hot inputs read single columns of a matrix back, exactly and in any dtype, so that one changed bit in them shows;
  other columns are read after every update;
* an input of random signs touches every element, up to rounding.

Vectors (norms, biases) are compared directly. A served parameter that nothing was received for, and a received one
whose layer type is not known here (a mixture of experts, a convolution), count as stale: unproven is not done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from ..engine.weight_sync import checksum

COLUMNS = 4
"""One-hot inputs of a probe; the row of signs comes on top."""
_CHUNK = 4096
"""Rows of a matrix that are handled at a time, which bounds temporary memory."""
# Relative to the largest possible rounding of a sum of k terms this is generous, and far below any wrong weight:
# the one-hot inputs are the sharp test.
_RELATIVE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def probe(
    width: int, number: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Probe `number` for layers with `width` inputs: [1 + COLUMNS, width], and the columns read [COLUMNS]."""
    generator = torch.Generator().manual_seed(width * 1_000_003 + number)
    columns = torch.randperm(width, generator=generator)[:COLUMNS]
    signs = torch.randint(0, 2, (1, width), generator=generator).mul(2).sub(1)
    rows = torch.cat([signs, nn.functional.one_hot(columns, width)])
    return rows.to(device, dtype), columns.to(device)


@dataclass(frozen=True, slots=True)
class Received:
    """What is kept of one parameter. A matrix [out, in]: answers [out, 1 + COLUMNS]; a vector: itself."""

    checksum: str
    vector: Tensor | None = None
    answers: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """The module that serves a parameter, and which of its fused parts (None: all of it)."""

    path: str
    module: nn.Module
    part: int | None
    as_head: bool = False
    """Ask for logits; otherwise an embedding is asked for its rows."""


class ReceivedWeights:
    """The parameters of the running or last weight update, by the learner's names."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._received: dict[str, Received] = {}
        self._number = 0

    def begin(self) -> None:
        self._received = {}
        self._number += 1

    @property
    def checksums(self) -> dict[str, str]:
        return {name: received.checksum for name, received in self._received.items()}

    def record(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass the stream of (name, tensor) on, noting each parameter."""
        for name, tensor in weights:
            self._received[name] = self._note(tensor)
            yield name, tensor

    def _note(self, tensor: Tensor) -> Received:
        digest = checksum(tensor)
        weight = tensor.to(self._dtype)
        if weight.dim() == 1:
            return Received(digest, vector=weight.clone())
        if weight.dim() != 2:
            return Received(digest)
        rows, columns = probe(weight.shape[1], self._number, torch.float32, weight.device)
        signed = torch.cat([part.float() @ rows[:1].T for part in weight.split(_CHUNK)])
        return Received(digest, answers=torch.cat([signed, weight[:, columns].float()], dim=1))

    @torch.inference_mode()
    def stale(self, model: nn.Module) -> list[str]:
        """Names whose served copy does not compute what was received; collective under tensor parallelism."""
        outputs: dict[tuple[str, bool], Tensor] = {}
        stale: list[str] = []
        seen: set[tuple[str, str, int | None]] = set()
        for name, received in self._received.items():
            kind = name.rpartition(".")[2]
            places = list(_places(model, name))
            seen.update((place.path, kind, place.part) for place in places)
            if not places or not all(
                self._agrees(place, kind, received, outputs) for place in places
            ):
                stale.append(name)
        return stale + list(_unseen(model, seen))

    def _agrees(
        self, place: Served, kind: str, received: Received, outputs: dict[tuple[str, bool], Tensor]
    ) -> bool:
        if received.vector is not None:
            return _same_vector(place, kind, received.vector)
        if received.answers is None or kind != "weight":
            return False
        key = (place.path, place.as_head)
        if key not in outputs:
            output = self._answer(place)
            if output is None:
                return False
            outputs[key] = output
        here, there = _rows(place, received.answers.shape[0])
        served, expected = outputs[key][here], received.answers[there]
        if served.shape != expected.shape or not torch.equal(served[:, 1:], expected[:, 1:]):
            return False
        scale = expected[:, 0].square().mean().sqrt()
        worst = (served[:, 0] - expected[:, 0]).abs().max()
        return bool(worst <= _RELATIVE[self._dtype] * (scale + expected[:, 0].abs().max()))

    def _answer(self, place: Served) -> Tensor | None:
        """What the served module computes for the probe: float32 [its outputs, 1 + COLUMNS]; None: unknown type."""
        module = place.module
        device = next(module.parameters()).device
        if isinstance(module, VocabParallelEmbedding):
            rows, _ = probe(module.embedding_dim, self._number, self._dtype, device)
            if place.as_head:
                return module.quant_method.apply(module, rows).float().T
            tokens = torch.arange(module.org_vocab_size, device=device)
            return torch.cat([module(ids).float() @ rows.float().T for ids in tokens.split(_CHUNK)])
        if isinstance(module, RowParallelLinear):
            rows, _ = probe(module.input_size, self._number, self._dtype, device)
            width = module.input_size_per_partition
            share = rows[:, module.tp_rank * width : (module.tp_rank + 1) * width].contiguous()
            output = module.quant_method.apply(module, share, None)
            return (
                (tensor_model_parallel_all_reduce(output) if module.tp_size > 1 else output)
                .float()
                .T
            )
        if isinstance(module, LinearBase):
            rows, _ = probe(module.input_size, self._number, self._dtype, device)
            return module.quant_method.apply(module, rows, None).float().T
        return None


def _places(model: nn.Module, name: str) -> Iterator[Served]:
    """Where a parameter of the learner is served: its own module, a part of a fused one, and a tied head."""
    path, _, _ = name.rpartition(".")
    modules = dict(model.named_modules())
    parent, _, last = path.rpartition(".")
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    for fused, parts in packed.items():
        fused_path = f"{parent}.{fused}" if parent else fused
        if path not in modules and last in parts and fused_path in modules:
            yield Served(fused_path, modules[fused_path], parts.index(last))
    if path not in modules:
        return
    module = modules[path]
    yield Served(path, module, None, as_head=isinstance(module, ParallelLMHead))
    if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
        heads = [(other, head) for other, head in tied_heads(model) if head.weight is module.weight]
        yield from (Served(other, head, None, as_head=True) for other, head in heads)
        if not any(isinstance(other, ParallelLMHead) for other in modules.values()):
            yield Served(path, module, None, as_head=True)  # Gemma: the embedding is the head


def tied_heads(model: nn.Module) -> list[tuple[str, ParallelLMHead]]:
    """Language-model heads that share their weight with an embedding, by path."""
    embeddings = [
        module.weight
        for module in model.modules()
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    ]
    return [
        (path, module)
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, ParallelLMHead) and any(module.weight is own for own in embeddings)
    ]


def _rows(place: Served, total: int) -> tuple[slice, slice]:
    """(rows of the module's output, rows of the full parameter) that belong together on this rank."""
    module: Any = place.module
    if place.as_head:
        first, last = (
            module.shard_indices.org_vocab_start_index,
            module.shard_indices.org_vocab_end_index,
        )
        return slice(0, last - first), slice(first, last)
    if not isinstance(module, ColumnParallelLinear):
        return slice(0, total), slice(0, total)
    sizes = [
        size // module.tp_size for size in getattr(module, "output_sizes", [module.output_size])
    ]
    if place.part is None and len(sizes) > 1:  # stored fused by the checkpoint as well
        return (
            (slice(0, total), slice(0, total))
            if module.tp_size == 1
            else (slice(0, 0), slice(0, total))
        )
    part = place.part or 0
    # Key and value heads are replicated when there are fewer of them than ranks.
    replicas = getattr(module, "num_kv_head_replicas", 1) if part else 1
    shard = module.tp_rank // replicas
    start = sum(sizes[:part])
    return slice(start, start + sizes[part]), slice(shard * sizes[part], (shard + 1) * sizes[part])


def _same_vector(place: Served, kind: str, expected: Tensor) -> bool:
    vector = getattr(place.module, kind, None)
    if not isinstance(vector, Tensor):
        return False
    here, there = _rows(place, expected.shape[0])
    return torch.equal(vector[here].to(expected.dtype), expected[there])


def _unseen(model: nn.Module, seen: set[tuple[str, str, int | None]]) -> Iterator[str]:
    """Served parameters that no received one covers."""
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    for path, module in model.named_modules(remove_duplicate=False):
        parts = packed.get(path.rpartition(".")[2], [])
        for kind, _ in module.named_parameters(recurse=False):
            whole = (path, kind, None) in seen
            if not whole and not (
                parts and all((path, kind, i) in seen for i in range(len(parts)))
            ):
                yield f"{path}.{kind}"
