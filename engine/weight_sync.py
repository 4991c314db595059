"""The learner's side of a weight sync: hash, lay out and deliver the weights.

    sender = make_sender(rollouts.weight_sync, rank=rank, dtype=..., timeout_seconds=...)      on every rank
    sender.connect(pool.receivers())
    checksums = sender.send(weights, version)

Senders differ only in how the bytes travel; each drives vLLM's own sequence `start_weight_update`, `update_weights`,
`finish_weight_update(version)` on the receivers (Ray actor handles). Neither ray nor vllm is imported before a sender
needs it. What follows a delivery is the proof: sync_proof.py.
"""

from __future__ import annotations

import functools
import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from .errors import WeightSyncError, WorkerLost
from .failpoints import reach

if TYPE_CHECKING:
    from torch import Tensor

Weights = Callable[[], Iterable[tuple[str, "Tensor"]]]
"""Starts a fresh pass over (Hugging Face name, full tensor), tied tensors once. The pass may be a collective."""

_BLOCK = 1 << 15
_ALIGNMENT = 64


@functools.cache
def _multipliers(device: torch.device) -> Tensor:
    """Fixed random odd int64 [_BLOCK]; odd, so that a change of any single word changes the sum."""
    generator = torch.Generator().manual_seed(0x9E3779B9)
    return torch.randint(-(2**62), 2**62, (_BLOCK,), generator=generator).mul(2).add(1).to(device)


def checksum(tensor: Tensor) -> str:
    """64-bit multilinear hash of a tensor's bytes, dtype and shape, as 16 hex digits.

    The same on every device, so that nothing has to leave a GPU; about 5 GB/s on two CPU cores. It finds accidents
    (lost, stale, swapped, flipped data), it does not resist an adversary.
    """
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if missing := -raw.numel() % 8:
        raw = torch.nn.functional.pad(raw, (0, missing))
    words = raw.view(torch.int64)
    multipliers = _multipliers(words.device)
    # Block by block on a CPU, where the products then stay in its cache; in few large kernels on a GPU.
    rows = 1 if words.device.type == "cpu" else 4096
    whole = words.numel() - words.numel() % _BLOCK
    sums = [
        (part.view(-1, _BLOCK) * multipliers).sum(1) for part in words[:whole].split(_BLOCK * rows)
    ]
    rest = words[whole:]
    sums.append((rest * multipliers[: rest.numel()]).sum().view(1))
    state = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    for value in torch.cat(sums).tolist():
        state = (state * 0x9E3779B97F4A7C15 + value) % 2**64
    return f"{state:016x}"


class WeightSender(Protocol):
    """Created on every learner rank; rank 0 is the one that talks to the receivers."""

    def connect(self, receivers: Sequence[Any]) -> None:
        """Remember where weights go; called once before the first `send`, and again after a receiver was replaced."""
        ...

    def send(self, weights: Weights, version: int) -> Mapping[str, str]:
        """Deliver one pass of `weights` to every receiver; the checksum of each parameter (rank 0; {} elsewhere).

        Every rank calls it, because the pass gathers. Raises WeightSyncError; after that no receiver serves. A receiver
        that dies is left out where the others do not need it (shared memory), else WorkerLost is raised.
        """
        ...

    def close(self) -> None: ...


class SharedMemorySender:
    """One flat buffer in memory that all receivers of this machine map.

    The buffer is a memfd: it is reused by every sync, vanishes with this process however that dies, and is not subject
    to the size of /dev/shm (64 MB in a default container). Receivers open it by its path below /proc.
    """

    def __init__(self, *, rank: int, dtype: torch.dtype, timeout_seconds: float) -> None:
        """`dtype` is that of the receivers: weights are converted before they are written and hashed."""
        self._rank = rank
        self._dtype = dtype
        self._timeout = timeout_seconds
        self._receivers: Sequence[Any] = ()
        self._file: int | None = None

    def connect(self, receivers: Sequence[Any]) -> None:
        self._receivers = tuple(receivers)
        if self._rank == 0:
            deadline = time.monotonic() + self._timeout
            call_living(self._receivers, "init_weight_transfer_engine", [{}], deadline)

    def send(self, weights: Weights, version: int) -> Mapping[str, str]:
        if self._rank != 0:
            for _ in weights():  # gathering is collective: this rank only takes part
                pass
            return {}
        reach("learner.sends")
        info = self._write(weights())
        deadline = time.monotonic() + self._timeout
        living = call_living(self._receivers, "start_weight_update", [], deadline)
        living = call_living(living, "update_weights", [info], deadline)
        reach("learner.sent")
        call_living(living, "finish_weight_update", [str(version)], deadline)
        return dict(zip(info["names"], info["checksums"], strict=True))

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
        """Fill the buffer; returns the JSON-able message for `update_weights`."""
        if self._file is None:
            self._file = os.memfd_create("plait-weights")
        info: dict[str, Any] = {
            "path": f"/proc/{os.getpid()}/fd/{self._file}",
            **{key: [] for key in ("names", "dtype_names", "shapes", "offsets", "checksums")},
        }
        end = 0
        for name, weight in weights:
            tensor = weight.detach().to("cpu", self._dtype).contiguous()
            info["names"].append(name)
            info["dtype_names"].append(str(tensor.dtype).removeprefix("torch."))
            info["shapes"].append(list(tensor.shape))
            info["offsets"].append(end)
            info["checksums"].append(checksum(tensor))
            self._write_bytes(tensor, end, name)
            end += tensor.nbytes + -tensor.nbytes % _ALIGNMENT
        os.ftruncate(self._file, end)
        return info

    def _write_bytes(self, tensor: Tensor, offset: int, name: str) -> None:
        """Copy by `pwrite`, which reports a full memory as an error; a store to a mapping would be a SIGBUS."""
        assert self._file is not None
        rest = tensor.view(-1).view(torch.uint8).numpy().data
        while rest:
            try:
                written = os.pwrite(self._file, rest, offset)
            except OSError as error:
                raise WeightSyncError(
                    f"no memory to send {name} to the rollout workers: {error}"
                ) from error
            rest, offset = rest[written:], offset + written


def call_all(receivers: Sequence[Any], method: str, args: list[Any], deadline: float) -> None:
    call_each(receivers, method, [args] * len(receivers), deadline)


def call_each(
    receivers: Sequence[Any], method: str, args: list[list[Any]], deadline: float
) -> None:
    """Call a method of every receiver at once and wait for all.

    Raises WorkerLost when one has died, WeightSyncError on every other failure and at the deadline.
    """
    living = _call(receivers, method, args, deadline)
    if len(living) < len(receivers):
        raise WorkerLost(f"a rollout worker died during {method}")


def call_living(
    receivers: Sequence[Any], method: str, args: list[Any], deadline: float
) -> list[Any]:
    """As `call_all`, but those that have died are left out of what is returned."""
    return _call(receivers, method, [args] * len(receivers), deadline)


def _call(
    receivers: Sequence[Any], method: str, args: list[list[Any]], deadline: float
) -> list[Any]:
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayError

    refs = [getattr(one, method).remote(*its) for one, its in zip(receivers, args, strict=True)]
    living = []
    for receiver, ref in zip(receivers, refs, strict=True):
        try:
            ray.get(ref, timeout=max(0.0, deadline - time.monotonic()))
        except GetTimeoutError as error:
            late = len(ray.wait(refs, num_returns=len(refs), timeout=0)[1])
            raise WeightSyncError(
                f"{late} of {len(refs)} rollout workers did not finish {method} before the sync deadline "
                "(rollouts.sync_timeout_seconds)"
            ) from error
        except RayActorError:
            continue
        except RayError as error:
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, WorkerLost):
                continue
            raise WeightSyncError(f"{method} failed: {cause}") from error
        living.append(receiver)
    return living


def make_sender(
    kind: Literal["shared_memory", "nccl", "ipc"],
    *,
    rank: int,
    dtype: torch.dtype,
    timeout_seconds: float,
    ranks_per_receiver: int = 1,
) -> WeightSender:
    """The sender for `rollouts.weight_sync`; `dtype` is the rollout workers'."""
    if kind == "shared_memory":
        return SharedMemorySender(rank=rank, dtype=dtype, timeout_seconds=timeout_seconds)
    from .vllm_sender import VllmSender

    return VllmSender(
        kind,
        rank=rank,
        dtype=dtype,
        timeout_seconds=timeout_seconds,
        ranks_per_receiver=ranks_per_receiver,
    )
