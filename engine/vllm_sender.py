"""Weights between GPUs, by vLLM's own trainer-side engines. **Untested until a GPU test has passed.**"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .weight_sync import Weights, call_all, call_each, checksum

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class VllmSender:
    """vLLM's own trainer engines: `nccl` between separate GPUs, `ipc` where learner and rollouts share a GPU.

    Written to vLLM 0.32's `WeightTransferTrainerFactory`. **Untested until a GPU test has passed.** The deadline
    covers every call to a receiver; an NCCL broadcast whose peer died is bounded only by NCCL's own watchdog.
    """

    def __init__(
        self,
        backend: Literal["nccl", "ipc"],
        *,
        rank: int,
        dtype: torch.dtype,
        timeout_seconds: float,
        ranks_per_receiver: int = 1,
    ) -> None:
        """`ranks_per_receiver`: GPUs of one rollout worker (its tensor parallel size)."""
        self._backend = backend
        self._rank = rank
        self._timeout = timeout_seconds
        self._source = _ReplayedWeights(dtype, hashes=rank == 0)
        self._client = _ReceiverClient(ranks_per_receiver)
        self._engine: Any = None

    def connect(self, receivers: Sequence[Any]) -> None:
        self.close()
        self._client.receivers = tuple(receivers)

    def send(self, weights: Weights, version: int) -> Mapping[str, str]:
        self._source.weights = weights
        self._client.version = str(version)
        self._client.deadline = time.monotonic() + self._timeout
        if self._engine is None:
            self._engine = self._rendezvous()
        self._engine.send_weights()
        return dict(self._source.checksums)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    def _rendezvous(self) -> Any:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.base import WeightSource
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip, get_open_port

        if self._backend == "nccl":
            init = NCCLTrainerInitInfo(
                master_address=get_ip(),
                master_port=get_open_port(),
                world_size=1 + len(self._client.receivers) * self._client.ranks_per_receiver,
                rank=self._rank,
            )
        else:
            init = IPCTrainerInitInfo(rank=self._rank, packed=True)
        # vLLM's base class is mixed in here, because importing it at the top would load vllm.
        source = type("Source", (_Delegate, WeightSource), {})(self._source)
        return WeightTransferTrainerFactory.trainer_init(init, client=self._client, source=source)


class _ReplayedWeights:
    """The current `Weights` as vLLM's WeightSource wants them: cheap metadata and fresh passes."""

    def __init__(self, dtype: torch.dtype, *, hashes: bool) -> None:
        self._dtype = dtype
        self._hashes = hashes
        self._metadata: list[Any] | None = None
        self.weights: Weights | None = None
        self.checksums: dict[str, str] = {}

    def metadata(self) -> list[Any]:
        """Names, dtypes, shapes: one pass (a collective) the first time; they never change within a run."""
        from vllm.distributed.weight_transfer import ParamMeta

        assert self.weights is not None
        if self._metadata is None:
            self._metadata = [
                ParamMeta(name, self._dtype, tuple(tensor.shape)) for name, tensor in self.weights()
            ]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        assert self.weights is not None
        self.checksums = {}
        for name, weight in self.weights():
            tensor = weight.detach().to(self._dtype).contiguous()
            if self._hashes:
                self.checksums[name] = checksum(tensor)
            yield name, tensor


class _Delegate:
    """The two abstract methods of vLLM's WeightSource, answered by a _ReplayedWeights."""

    def __init__(self, source: _ReplayedWeights) -> None:
        self._source = source

    def metadata(self) -> list[Any]:
        return self._source.metadata()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._source)


class _ReceiverClient:
    """vLLM's weight-sync client protocol over Ray actors, with a deadline and the policy version.

    vLLM's own RayVLLMWeightSyncClient waits for ever, and gives independent engines the same NCCL rank.
    """

    def __init__(self, ranks_per_receiver: int) -> None:
        self.ranks_per_receiver = ranks_per_receiver
        self.receivers: Sequence[Any] = ()
        self.version = ""
        self.deadline = 0.0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [dict(init_info) for _ in self.receivers]
        if "rank_offset" in init_info:
            for place, info in enumerate(infos):
                info["rank_offset"] = 1 + place * self.ranks_per_receiver
        call_each(
            self.receivers, "init_weight_transfer_engine", [[info] for info in infos], self.deadline
        )

    def start_weight_update(self) -> None:
        call_all(self.receivers, "start_weight_update", [], self.deadline)

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        call_all(self.receivers, "update_weights", [update_info], self.deadline)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        call_all(
            self.receivers, "finish_weight_update", [weight_version or self.version], self.deadline
        )
