"""The rollout worker's side of a weight sync, loaded into vLLM's worker process by `worker_extension_cls`.

Importing this module registers three engines with vLLM's WeightTransferEngineFactory:

* `shared_memory`: ours, for CPU. Maps the learner's buffer and loads it through vLLM's layerwise reload;
* `plait_nccl`, `plait_ipc`: vLLM's own, with the same record of what was received. **Untested until a GPU test has
  passed.**

It also ties the life of the vLLM process to the Ray actor that started it.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from ..engine.errors import WeightSyncError
from .engine_process import ACTOR_PID
from .served_weights import ReceivedWeights, tied_heads

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.weight_transfer import WeightTransferConfig


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand: every update says where its buffer is."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """Where each parameter lies in the flat file `path`, and the checksum that the learner computed."""

    path: str
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    checksums: list[str]


class RecordingModel:
    """Stands in for the served model while weights arrive, and notes them on their way."""

    def __init__(self, model: nn.Module, received: ReceivedWeights) -> None:
        self._model: Any = model
        self._received = received

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        return self._model.load_weights(self._received.record(weights))


class _Recorded(WeightTransferEngine):
    """Adds to a weight transfer engine the record that `ReceivedWeights.stale` needs."""

    def __init__(
        self,
        config: WeightTransferConfig,
        vllm_config: VllmConfig,
        device: torch.device,
        model: nn.Module,
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self.received = ReceivedWeights(vllm_config.model_config.dtype)

    def start_weight_update(self) -> None:
        self.received.begin()
        super().start_weight_update()  # pyright: ignore[reportAbstractUsage]

    def receive_weights(self, update_info: Any) -> None:
        served: Any = self.model
        self.model = RecordingModel(served, self.received)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            super().receive_weights(update_info)  # pyright: ignore[reportAbstractUsage]
        finally:
            self.model = served


class SharedMemoryTransfer(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Loads a flat file of parameters. Raises WeightSyncError naming the parameter that did not arrive intact."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Not the base class's: that one also synchronizes an accelerator, and there is none.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        # A private mapping: pages are read when needed, and nothing here can write to the learner's buffer.
        size = os.stat(update_info.path).st_size
        buffer = torch.from_file(update_info.path, shared=False, size=size, dtype=torch.uint8)
        model: Any = self.model
        model.load_weights(
            (name, _view(buffer, dtype, shape, offset, name))
            for name, dtype, shape, offset in zip(
                update_info.names,
                update_info.dtype_names,
                update_info.shapes,
                update_info.offsets,
                strict=True,
            )
        )

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        # The reload copies into tied weights through the embedding only; on a CPU the head keeps multiplying with its
        # old packed copy, without an error, unless it is packed again.
        for _, head in tied_heads(self.model):
            dispatch_cpu_unquantized_gemm(head, remove_weight=False)

    def shutdown(self) -> None:
        pass


class SharedMemoryEngine(_Recorded, SharedMemoryTransfer):
    """`shared_memory`: SharedMemoryTransfer with checksums verified as the parameters arrive."""

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        super().receive_weights(update_info)
        received = self.received.checksums
        for name, sent in zip(update_info.names, update_info.checksums, strict=True):
            if received.get(name) != sent:
                raise WeightSyncError(
                    f"parameter {name} arrived with checksum {received.get(name)}, the learner sent {sent}"
                )


class NcclEngine(_Recorded, NCCLWeightTransferEngine):
    """`plait_nccl`: vLLM's nccl engine with the record of what was received."""


class IpcEngine(_Recorded, IPCWeightTransferEngine):
    """`plait_ipc`: vLLM's ipc engine with the record of what was received."""


def _view(buffer: Tensor, dtype_name: str, shape: list[int], offset: int, name: str) -> Tensor:
    dtype: torch.dtype = getattr(torch, dtype_name)
    size = dtype.itemsize * torch.Size(shape).numel()
    if offset + size > buffer.numel():
        raise WeightSyncError(
            f"parameter {name} ends behind the learner's buffer of {buffer.numel()} bytes"
        )
    return buffer[offset : offset + size].view(dtype).view(shape)


class WeightSyncExtension:
    """Methods that RolloutWorker calls in vLLM's worker process through `collective_rpc`."""

    weight_transfer_engine: Any
    model_runner: Any

    def beat(self) -> None:
        """Says that vLLM's process takes calls."""

    def prove_served_weights(self) -> dict[str, Any]:
        """{"checksums": {name: digest}, "stale": [name]} of the last update."""
        received: ReceivedWeights = self.weight_transfer_engine.received
        return {
            "checksums": received.checksums,
            "stale": received.stale(self.model_runner.get_model()),
        }


def _die_with(actor: int) -> None:
    """End this process, and vLLM's own processes above it, when the actor that started them is gone.

    vLLM's EngineCore does not notice that its client was killed and would keep its memory for ever. A pidfd, unlike
    PR_SET_PDEATHSIG, watches the process and not the thread that happened to start it.
    """
    parent = os.getppid()

    def watch() -> None:
        try:
            handle = os.pidfd_open(actor)
        except ProcessLookupError:
            pass  # already gone
        else:
            select.select([handle], [], [])
        if parent not in (actor, 1) and os.getppid() == parent:
            os.kill(parent, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="actor-watch", daemon=True).start()


WeightTransferEngineFactory.register_engine("shared_memory", SharedMemoryEngine)
WeightTransferEngineFactory.register_engine("plait_nccl", NcclEngine)
WeightTransferEngineFactory.register_engine("plait_ipc", IpcEngine)
if ACTOR_PID in os.environ and int(os.environ[ACTOR_PID]) != os.getpid():
    _die_with(int(os.environ[ACTOR_PID]))
