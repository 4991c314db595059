"""The learner's side of a weight sync, and the proof that ends each one.

    sender.connect(pool.receivers())                       once
    checksums = sender.send(weights, version)              after every step
    prove_sync(learners, pool, version=..., checksums=..., probes=..., tolerance=...)

Senders differ only in how the bytes travel; each drives vLLM's own sequence `start_weight_update`, `update_weights`,
`finish_weight_update(version)` on the receivers (Ray actor handles). Neither ray nor vllm is imported before a sender
needs it.
"""

from __future__ import annotations

import functools
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from .errors import WeightSyncError

if TYPE_CHECKING:
    from torch import Tensor

    from .contracts import Learners, RolloutPool, ServedProof

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

        Every rank calls it, because the pass gathers. Raises WeightSyncError; after that no receiver serves.
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
            _call(self._receivers, "init_weight_transfer_engine", [{}], deadline)

    def send(self, weights: Weights, version: int) -> Mapping[str, str]:
        if self._rank != 0:
            for _ in weights():  # gathering is collective: this rank only takes part
                pass
            return {}
        info = self._write(weights())
        deadline = time.monotonic() + self._timeout
        _call(self._receivers, "start_weight_update", [], deadline)
        _call(self._receivers, "update_weights", [info], deadline)
        _call(self._receivers, "finish_weight_update", [str(version)], deadline)
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
        rest = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        while rest:
            try:
                written = os.pwrite(self._file, rest, offset)
            except OSError as error:
                raise WeightSyncError(
                    f"no memory to send {name} to the rollout workers: {error}"
                ) from error
            rest, offset = rest[written:], offset + written


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
        _call_each(
            self.receivers, "init_weight_transfer_engine", [[info] for info in infos], self.deadline
        )

    def start_weight_update(self) -> None:
        _call(self.receivers, "start_weight_update", [], self.deadline)

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        _call(self.receivers, "update_weights", [update_info], self.deadline)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        _call(
            self.receivers, "finish_weight_update", [weight_version or self.version], self.deadline
        )


def _call(receivers: Sequence[Any], method: str, args: list[Any], deadline: float) -> None:
    _call_each(receivers, method, [args] * len(receivers), deadline)


def _call_each(
    receivers: Sequence[Any], method: str, args: list[list[Any]], deadline: float
) -> None:
    """Call a method of every receiver at once and wait for all; WeightSyncError on failure or at the deadline."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    refs = [getattr(one, method).remote(*its) for one, its in zip(receivers, args, strict=True)]
    try:
        ray.get(refs, timeout=max(0.0, deadline - time.monotonic()))
    except GetTimeoutError as error:
        raise WeightSyncError(
            f"rollout workers did not finish {method} before the sync deadline"
        ) from error
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        raise WeightSyncError(f"{method} failed: {cause}") from error


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
    return VllmSender(
        kind,
        rank=rank,
        dtype=dtype,
        timeout_seconds=timeout_seconds,
        ranks_per_receiver=ranks_per_receiver,
    )


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far learner and sampler may differ in one token's log-prob, in nats."""

    max_abs: float
    mean_abs: float

    @classmethod
    def for_dtype(cls, rollout_dtype: str) -> Tolerance:
        """float32 kernels agree to 1e-6..2e-5 where the model is right, a stale head is off by 0.3; so 1e-3.

        bfloat16 rounds each layer differently in each engine: 0.1-0.3 on single tokens is normal and grows with a
        token's surprise, while the mean stays near 0.01. The mean is therefore the sharp bound, the maximum a coarse one;
        small staleness is found by `ServedProof.stale`, which compares exactly.
        """
        return cls(1e-3, 1e-3) if rollout_dtype == "float32" else cls(1.0, 0.05)


@dataclass(frozen=True, slots=True)
class SyncProof:
    """What was established about one version on every worker."""

    version: int
    workers: tuple[str, ...]
    parameters: int
    probe_tokens: int
    max_difference: float
    mean_difference: float


def prove_sync(
    learners: Learners,
    pool: RolloutPool,
    *,
    version: int,
    checksums: Mapping[str, str],
    probes: Sequence[Sequence[int]],
    tolerance: Tolerance,
) -> SyncProof:
    """Driver: compare what every worker serves with what the learner has; WeightSyncError names the difference.

    `checksums` is what `send_weights(version)` returned; `probes` are token sequences of at least two tokens.
    """
    expected = learners.logprobs(probes)
    proofs = pool.prove(version, probes)
    if not proofs:
        raise WeightSyncError(f"no rollout worker proved version {version}")
    differences: list[float] = []
    for proof in proofs:
        _check_parameters(proof, version, checksums)
        differences += _check_probes(proof, expected, tolerance)
    return SyncProof(
        version=version,
        workers=tuple(proof.worker for proof in proofs),
        parameters=len(checksums),
        probe_tokens=len(differences),
        max_difference=max(differences, default=0.0),
        mean_difference=sum(differences) / max(1, len(differences)),
    )


def _check_parameters(proof: ServedProof, version: int, checksums: Mapping[str, str]) -> None:
    where = f"rollout worker {proof.worker}"
    if proof.version != version:
        raise WeightSyncError(f"{where} serves version {proof.version}, not {version}")
    for name in [*checksums, *proof.checksums]:
        sent, received = checksums.get(name, "nothing"), proof.checksums.get(name, "nothing")
        if sent != received:
            raise WeightSyncError(
                f"{where}, version {version}: parameter {name} has checksum {received}, the learner sent {sent}"
            )
    if proof.stale:
        raise WeightSyncError(
            f"{where}, version {version}: the served copy of {', '.join(proof.stale)} is not proven to compute what "
            "was received; it is stale, or of a layer type whose served copy plait cannot check"
        )


def _check_probes(
    proof: ServedProof, expected: Sequence[Sequence[float]], tolerance: Tolerance
) -> list[float]:
    """Absolute differences of all probe tokens of one worker."""
    where = f"rollout worker {proof.worker}, version {proof.version}"
    differences: list[float] = []
    if len(proof.logprobs) != len(expected):
        raise WeightSyncError(f"{where}: {len(proof.logprobs)} of {len(expected)} probes came back")
    for number, (ours, theirs) in enumerate(zip(expected, proof.logprobs, strict=True)):
        if len(ours) != len(theirs):
            raise WeightSyncError(
                f"{where}, probe {number}: {len(theirs)} log-probs for {len(ours)} tokens"
            )
        for position, (learner, served) in enumerate(zip(ours, theirs, strict=True), start=1):
            difference = abs(learner - served)
            if not difference <= tolerance.max_abs:  # also catches NaN
                raise WeightSyncError(
                    f"{where}, probe {number}, token {position}: served log-prob {served:.6f}, the learner's "
                    f"{learner:.6f}; allowed difference {tolerance.max_abs}"
                )
            differences.append(difference)
    mean = sum(differences) / max(1, len(differences))
    if mean > tolerance.mean_abs:
        raise WeightSyncError(
            f"{where}: log-probs of the probes differ by {mean:.6f} on average; allowed {tolerance.mean_abs}"
        )
    return differences
