"""The learner's side without vLLM: checksums, the shared buffer, and what the receivers are told."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch

from plait.engine.errors import WeightSyncError
from plait.engine.weight_sync import SharedMemorySender, checksum, make_sender


def some_weights() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        ("a.weight", torch.randn(33, 7, generator=generator)),
        ("a.bias", torch.randn(33, generator=generator)),
        ("b.weight", torch.randn(300, 300, generator=generator)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 32768 * 2, 100_003, 32768 * 4])
def test_checksum_sees_every_change(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)
    digest = checksum(tensor)
    assert digest == checksum(tensor.clone())
    for place in {0, size // 2, size - 1}:
        changed = tensor.clone()
        changed.view(torch.uint8)[place * dtype.itemsize] ^= 1
        assert checksum(changed) != digest
    if size > 1:
        assert checksum(tensor.flip(0)) != digest


def test_checksum_sees_blocks_swapped_shape_and_dtype() -> None:
    tensor = torch.arange(4 * 65536, dtype=torch.int32).view(torch.float32)
    halves = torch.cat([tensor[2 * 65536 :], tensor[: 2 * 65536]])
    same_bytes = [tensor, halves, tensor.view(2, -1), tensor.view(torch.int32)]
    assert len({checksum(one) for one in same_bytes}) == 4


def test_checksum_ignores_memory_layout() -> None:
    tensor = torch.randn(64, 48)
    assert checksum(tensor.T) == checksum(tensor.T.contiguous())


def test_buffer_holds_the_weights_and_is_reused() -> None:
    sender = SharedMemorySender(rank=0, dtype=torch.bfloat16, timeout_seconds=1)
    first = sender._write(some_weights())
    for (name, weight), got, shape, offset, digest in zip(
        some_weights(),
        *(first[key] for key in ("names", "shapes", "offsets", "checksums")),
        strict=True,
    ):
        assert got == name
        assert offset % 64 == 0
        buffer = torch.from_file(
            first["path"], size=os.stat(first["path"]).st_size, dtype=torch.uint8
        )
        sent = buffer[offset : offset + 2 * weight.numel()].view(torch.bfloat16).view(shape)
        assert torch.equal(sent, weight.bfloat16())
        assert digest == checksum(sent)
    second = sender._write(some_weights()[:1])
    assert second["path"] == first["path"]
    assert os.stat(second["path"]).st_size == 33 * 7 * 2 + 50  # the rest is cut off
    sender.close()
    assert not os.path.exists(first["path"])
    sender.close()


def test_other_ranks_only_iterate() -> None:
    seen: list[str] = []

    def weights():
        for name, weight in some_weights():
            seen.append(name)
            yield name, weight

    sender = make_sender("shared_memory", rank=1, dtype=torch.float32, timeout_seconds=1)
    sender.connect([object()])
    assert sender.send(weights, 1) == {}
    assert seen == ["a.weight", "a.bias", "b.weight"]


def test_full_memory_is_an_error(monkeypatch) -> None:
    def pwrite(*_):
        raise OSError(28, "No space left on device")

    sender = SharedMemorySender(rank=0, dtype=torch.float32, timeout_seconds=1)
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(WeightSyncError, match=r"a\.weight.*No space left"):
        sender._write(some_weights())


class Receiver:
    """What a rollout worker offers, as a Ray actor that only takes notes."""

    def __init__(self, failing: str = "", hanging: str = "") -> None:
        self._failing, self._hanging = failing, hanging
        self._calls: list[tuple[str, Any]] = []

    def _note(self, method: str, *args: Any) -> None:
        if method == self._hanging:
            time.sleep(60)
        if method == self._failing:
            raise WeightSyncError(f"worker rollout-7 broke in {method}")
        self._calls.append((method, *args))

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        self._note("init", info)

    def start_weight_update(self) -> None:
        self._note("start")

    def update_weights(self, info: dict[str, Any]) -> None:
        with open(info["path"], "rb") as buffer:  # readable from another process
            self._note("update", info["names"], len(buffer.read()))

    def finish_weight_update(self, version: str) -> None:
        self._note("finish", version)

    def calls(self) -> list[tuple[str, Any]]:
        return self._calls


@pytest.fixture
def receiver(ray_session):
    import ray

    actors = []

    def start(**options: str) -> Any:
        # By value: the module of a test cannot be imported by its name in another process.
        actors.append(
            ray.remote(type("Receiver", (), dict(vars(Receiver))))
            .options(num_cpus=0)
            .remote(**options)
        )
        return actors[-1]

    yield start
    for actor in actors:
        ray.kill(actor)


def test_receivers_are_led_through_vllms_sequence(receiver) -> None:
    import ray

    both = [receiver(), receiver()]
    sender = SharedMemorySender(rank=0, dtype=torch.float32, timeout_seconds=60)
    sender.connect(both)
    checksums = sender.send(some_weights, 7)
    assert checksums == {name: checksum(weight) for name, weight in some_weights()}
    for one in both:
        calls = ray.get(one.calls.remote())
        assert [call[0] for call in calls] == ["init", "start", "update", "finish"]
        assert calls[2][1] == ["a.weight", "a.bias", "b.weight"]
        assert calls[3] == ("finish", "7")
    sender.close()


def test_failure_of_one_receiver(receiver) -> None:
    sender = SharedMemorySender(rank=0, dtype=torch.float32, timeout_seconds=60)
    sender.connect([receiver(), receiver(failing="update")])
    with pytest.raises(WeightSyncError, match="worker rollout-7 broke in update"):
        sender.send(some_weights, 1)


def test_deadline(receiver) -> None:
    sender = SharedMemorySender(rank=0, dtype=torch.float32, timeout_seconds=60)
    sender.connect([receiver(hanging="start")])
    sender._timeout = 0.3
    with pytest.raises(WeightSyncError, match="start_weight_update before the sync deadline"):
        sender.send(some_weights, 1)
