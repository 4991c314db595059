"""F14 and F15: a disk that takes no more, and a folder that cannot be written."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import Stream, checkpoints_of, contents, exit_code, start

from end_to_end.command_line import tiny_recipe
from plait.engine.checkpoint import Checkpoints
from plait.engine.durable import probe_folder
from plait.engine.errors import CheckpointError
from plait.engine.learner_state import Piece, Snapshot
from plait.engine.run_state import RunState
from plait.engine.state_writer import StateWriter
from plait.launch import run
from plait.launch.config import validate

SECONDS = 5.0


class Tensors:
    """A learner of one rank that is one tensor."""

    def __init__(self) -> None:
        self.writer = StateWriter()
        self.weight = torch.arange(50_000, dtype=torch.float32)

    def save(self, folder: str) -> None:
        snapshot = Snapshot()
        snapshot.add("policy/master/w", Piece((50_000,), 0, 50_000), self.weight)
        self.writer.start(Path(folder) / "rank-00000.safetensors", snapshot, 1)

    def saved(self, *, wait: bool) -> Any:
        record = self.writer.finished(wait=wait)
        return None if record is None else [record]


def save(checkpoints: Checkpoints, learners: Any, step: int) -> None:
    stream: Any = Stream()
    checkpoints.save(RunState(step=step), stream, stream, learners)
    checkpoints.settle(wait=True)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def device_that_is_full(monkeypatch) -> None:
    plain = Path.open

    def open_full(self: Path, mode: str = "r", **options: Any) -> Any:
        full = self.name.startswith("rank-") and "x" in mode
        return open("/dev/full", "wb", buffering=0) if full else plain(self, mode, **options)

    monkeypatch.setattr(Path, "open", open_full)


def failing_flush(monkeypatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.parametrize("fault", [device_that_is_full, failing_flush])
def test_f14_a_write_that_fails_leaves_everything_as_it_was(tmp_path, monkeypatch, fault, measured):
    folder, learners = tmp_path / "checkpoints", Tensors()
    checkpoints = checkpoints_of(folder)
    save(checkpoints, learners, 1)
    before, weight = tree(folder), learners.weight.clone()
    with monkeypatch.context() as broken:
        fault(broken)
        with pytest.raises(CheckpointError, match=r"cannot be written: .*untouched"):
            save(checkpoints, learners, 2)
    assert tree(folder) == before
    assert torch.equal(learners.weight, weight)
    save(checkpoints, learners, 2)  # once there is room again, the run goes on
    saved = checkpoints_of(folder).latest()
    assert saved is not None
    assert saved.manifest.step == 2
    measured("F14", f"{fault.__name__.replace('_', ' ')}: previous valid 1/1, leftover bytes 0")


@pytest.mark.parametrize("place", ["learner_opened", "state_written", "manifest_written"])
def test_f14_a_hook_that_fails(tmp_path, monkeypatch, place):
    folder, learners = tmp_path / "checkpoints", Tensors()
    checkpoints = checkpoints_of(folder)
    save(checkpoints, learners, 1)
    before = tree(folder)
    with monkeypatch.context() as broken:
        broken.setattr("plait.engine.failpoints._reached", {f"checkpoint.{place}": 0})
        broken.setenv("PLAIT_FAILPOINT", f"full:checkpoint.{place}")
        with pytest.raises(CheckpointError, match="No space left on device"):
            save(checkpoints, learners, 2)
    assert tree(folder) == before


def test_f14_what_does_not_fit_is_refused_before_it_is_written(tmp_path, monkeypatch):
    learners = Tensors()
    checkpoints = checkpoints_of(tmp_path / "checkpoints")

    class Usage:
        free = 150_000

    monkeypatch.setattr("plait.engine.state_writer.shutil.disk_usage", lambda path: Usage)
    with pytest.raises(CheckpointError, match=r"takes 0 MB and .* has 0 MB free"):
        save(checkpoints, learners, 1)
    assert tree(tmp_path) == {}


def test_f14_the_limit_of_file_sizes_ends_a_real_run_with_one_error(tiny_model, tmp_path, measured):
    folder = tmp_path / "run"
    assert exit_code(start(tiny_model, folder, steps=1)) == 0
    before = tree(folder)
    size = max(map(len, before.values()))
    assert exit_code(start(tiny_model, folder, limit=size // 2, steps=3)) == 1
    assert tree(folder) == before
    assert exit_code(start(tiny_model, folder, steps=2)) == 0
    assert sorted(contents(checkpoints_of(folder))) == [1, 2]
    measured("F14", "RLIMIT_FSIZE on a real run: previous valid 1/1, leftover bytes 0, resumed")


def refused(folder: Path) -> float:
    """Seconds until `plait train` refuses to start a run there."""
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="cannot be written"):
        run.train(validate(recipe_in(folder)))
    return time.perf_counter() - started


RECIPE: dict[str, Any] = {}


def recipe_in(folder: Path) -> dict[str, Any]:
    return {**RECIPE, "run": {"name": "nowhere", "dir": str(folder)}}


def test_f15_a_folder_that_cannot_be_written_is_refused_at_once(
    tmp_path, tiny_model, monkeypatch, measured
):
    data = tmp_path / "data.jsonl"
    rows = ({"prompt": f"{i} =", "answer": f"{i}", "demonstration": f"{i}"} for i in range(12))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    RECIPE.update(tiny_recipe(tiny_model, data={"path": str(data)}))
    file = tmp_path / "file"
    file.write_text("")
    found = {"a file is in its way": refused(file), "no such place": refused(Path("/proc/none"))}
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "checkpoints").symlink_to("/sys/kernel")
    found["not writable"] = refused(tmp_path)
    slow = tmp_path / "slow"
    with monkeypatch.context() as broken:
        broken.setattr(run, "identity_of", None)  # never reached
        broken.setattr("plait.engine.durable.sync_folder", lambda folder: time.sleep(60))
        started = time.perf_counter()
        with pytest.raises(CheckpointError, match=r"took longer than 1 s"):
            probe_folder(slow, 1.0)
        assert time.perf_counter() - started < 2
    worst = max(found.values())
    assert worst <= SECONDS, found
    assert run.PROBE_SECONDS <= SECONDS
    measured("F15", f"{len(found) + 1} of {len(found) + 1} refused, worst {worst:.1f} s, steps 0")
