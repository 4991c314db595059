"""Checkpoints: complete and verified, or invisible.

Everything is written into a hidden folder beside its final place and flushed; manifest.json, with size and sha256 of
every file, comes last. Then the folder is renamed, and only then named by the pointer `latest`. The learner's state is
copied to host memory and written while training goes on; a later call commits it. Nothing in a checkpoint is pickled.

Reading checks every byte first. What is damaged is named, and the checkpoint before it is used; where none is left,
that is an error, never a fresh start.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .config import CheckpointConfig
from .contracts import Algorithm, DataSource, Learners
from .durable import DOING, FileRecord, replace_durably, storage_errors, sync_folder, write_durably
from .errors import CheckpointError, PlaitError
from .failpoints import reach
from .manifest import MANIFEST, Manifest, digest, sealed, unsealed
from .run_state import RunState

STATE_FILE, LEARNER, POINTER = "state.json", "learner", "latest"
COMPLETE = re.compile(r"step-\d{6,}")


@dataclass(frozen=True)
class Saved:
    """A checkpoint of which every byte was found to be what was written."""

    folder: Path
    manifest: Manifest

    @property
    def learner_files(self) -> list[str]:
        return [str(path) for path in self.manifest.under(self.folder, LEARNER)]


@dataclass(frozen=True)
class Snapshot:
    """The driver's part of a checkpoint, as it was at one moment."""

    step: int
    accuracy: float | None
    content: str
    """Of state.json."""


def snapshot(state: RunState, algorithm: Algorithm, data: DataSource) -> Snapshot:
    content = {"run": asdict(state), "algorithm": algorithm.state_dict(), "data": data.state_dict()}
    return Snapshot(state.step, state.accuracy, json.dumps(content, indent=1))


@dataclass(frozen=True)
class Pending:
    """A checkpoint that ranks are writing."""

    manifest: Manifest
    """Without its files."""
    work: Path
    content: str
    """Of state.json."""
    learners: Learners


def say_on_stderr(message: str) -> None:
    print(message, file=sys.stderr)


class Checkpoints:
    """The `checkpoints/` folder of one run. One process writes it at a time (launch/run_lock.py)."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        *,
        identity: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = say_on_stderr,
    ) -> None:
        """`identity`: what the run is made of, for the manifest; `say` tells a person what was found damaged."""
        self.folder, self.every, self.keep = folder, config.every, config.keep
        self.identity, self._say = identity or {}, say
        self._pending: Pending | None = None

    # -- writing ------------------------------------------------------------------------------

    def save(
        self, state: RunState, algorithm: Algorithm, data: DataSource, learners: Learners
    ) -> None:
        """Take a snapshot and begin to write it; `settle` commits it. The one before is committed first."""
        self.write(snapshot(state, algorithm, data), learners)

    def write(self, taken: Snapshot, learners: Learners) -> None:
        """`save` with a snapshot of before; the learners must still hold the weights of that moment."""
        self.settle(wait=True)
        name = f"step-{taken.step:06d}"
        # A name of its own: what a lost writer of an earlier try still writes lands elsewhere.
        work = self.folder / f".{name}.{secrets.token_hex(4)}.partial"
        manifest = Manifest(taken.step, 0, (), taken.accuracy, self.identity)
        pending = Pending(manifest, work, taken.content, learners)
        with self._removing(work), storage_errors(work, DOING):
            work.mkdir(parents=True)
            reach("checkpoint.begun")
            learners.save(str(work / LEARNER))
        self._pending = pending

    @property
    def pending(self) -> bool:
        """Whether a snapshot is being written."""
        return self._pending is not None

    def settle(self, *, wait: bool) -> int | None:
        """Commit what `save` began, if it is written by now; returns its step where that happens.

        Raises CheckpointError where it could not be written: nothing of it stays, what was saved before is untouched.
        """
        pending = self._pending
        if pending is None:
            return None
        with self._removing(pending.work):
            records = pending.learners.saved(wait=wait)
            if records is None:
                return None
            with storage_errors(pending.work, DOING):
                self._commit(pending, records)
        self._pending = None
        return pending.manifest.step

    @contextmanager
    def _removing(self, work: Path) -> Iterator[None]:
        """A failure leaves nothing of the folder behind."""
        try:
            yield
        except (PlaitError, OSError):
            self._pending = None
            shutil.rmtree(work, ignore_errors=True)
            raise

    def _commit(self, pending: Pending, records: Sequence[FileRecord]) -> None:
        work, step = pending.work, pending.manifest.step
        for record in records:
            check_visible(work / LEARNER / record.path, record.bytes)
        files = [replace(record, path=f"{LEARNER}/{record.path}") for record in records]
        files.append(write_durably(work / STATE_FILE, pending.content))
        reach("checkpoint.state_written")
        manifest = replace(pending.manifest, world_size=len(records), files=tuple(files))
        text = manifest.to_text()
        write_durably(work / MANIFEST, text)
        reach("checkpoint.manifest_written")
        sync_folder(work / LEARNER)
        sync_folder(work)
        reach("checkpoint.files_synced")
        final = self.folder / f"step-{step:06d}"
        if final.exists():  # never the newest valid one: that is where the run came from
            remove(final)
        work.rename(final)
        reach("checkpoint.renamed")
        sync_folder(self.folder)
        reach("checkpoint.folder_synced")
        pointer = {"checkpoint": final.name, "manifest_sha256": digest(text)}
        replace_durably(self.folder / POINTER, sealed(pointer))
        reach("checkpoint.committed")
        self._prune()

    def _prune(self) -> None:
        """Keep the newest ones, and the best of those that were evaluated."""
        kept = self.complete()
        best = self.best()
        for old in kept[: -self.keep]:
            if best is None or old != best:
                reach("checkpoint.pruning")
                remove(old)

    # -- reading ------------------------------------------------------------------------------

    def complete(self) -> list[Path]:
        """Checkpoints that were renamed into place, oldest first; not yet verified."""
        if not self.folder.is_dir():
            return []
        return sorted(
            (path for path in self.folder.iterdir() if COMPLETE.fullmatch(path.name)),
            key=lambda path: int(path.name.removeprefix("step-")),
        )

    def best(self) -> Path | None:
        """The checkpoint with the best evaluation at its step, the first of equals; None where none was evaluated."""
        found: dict[Path, float] = {}
        for path in self.complete():
            try:
                accuracy = Manifest.read(path).accuracy
            except CheckpointError:
                continue  # `latest` says so when it is to be used
            if accuracy is not None:
                found[path] = accuracy
        return max(found, key=lambda path: found[path], default=None)

    def best_saved(self) -> Saved | None:
        """The best one, verified; raises CheckpointError where it is damaged."""
        best = self.best()
        return None if best is None else self.verified(best)

    def latest(self) -> Saved | None:
        """The newest checkpoint that is intact; None before the first one. What is not intact is named.

        Raises CheckpointError where there are some and none can be used.
        """
        candidates = self.complete()
        expected, troubles = self._read_pointer(candidates)
        for path in reversed(candidates):
            try:
                saved = self.verified(path, expected.get(path.name))
            except CheckpointError as error:
                troubles.append(str(error))
                continue
            for trouble in troubles:
                self._say(f"checkpoint: {trouble}")
            if troubles:
                self._say(f"checkpoint: {path.name} is intact and is used instead")
            return saved
        if troubles:
            raise CheckpointError(
                f"{self.folder}: no checkpoint can be used. "
                + "; ".join(troubles)
                + ". Restore one of them from a "
                "copy, or remove the folder to begin anew"
            )
        return None

    def verified(self, folder: Path, manifest_sha256: str | None = None) -> Saved:
        """Raises CheckpointError naming what is damaged or missing."""
        manifest = Manifest.read(folder)
        if manifest_sha256 not in (None, digest(manifest.to_text())):
            raise CheckpointError(f"{folder / MANIFEST} is not the one that {POINTER!r} names")
        if f"step-{manifest.step:06d}" != folder.name:
            raise CheckpointError(f"{folder} holds the checkpoint of step {manifest.step}")
        manifest.verify(folder)
        return Saved(folder, manifest)

    def _read_pointer(self, candidates: Sequence[Path]) -> tuple[dict[str, str], list[str]]:
        """{name of the committed checkpoint: digest of its manifest}, and what is wrong with the pointer."""
        pointer = self.folder / POINTER
        if not candidates and not pointer.exists():
            return {}, []
        try:
            content = unsealed(pointer)
        except CheckpointError as error:
            return {}, [str(error)]
        name = content["checkpoint"]
        gone = name not in [path.name for path in candidates]
        troubles = [f"{pointer} names {name}, which is missing"] if gone else []
        return {name: content["manifest_sha256"]}, troubles

    def restore(self, algorithm: Algorithm, data: DataSource, learners: Learners) -> RunState:
        """Load the newest intact checkpoint into all parts; a fresh state where there never was one."""
        self._pending = None  # of ranks that are gone
        saved = self.latest()
        self._tidy(saved)
        return RunState() if saved is None else load(saved, algorithm, data, learners)

    def _tidy(self, used: Saved | None) -> None:
        """Remove what interrupted saves left, and put damaged checkpoints aside: they must not count as kept."""
        if not self.folder.is_dir():
            return
        for leftover in self.folder.glob(".*.partial"):
            remove(leftover)
        for leftover in self.folder.glob(".*.removed"):
            shutil.rmtree(leftover, ignore_errors=True)
        for path in self.complete():
            if used is not None and step_of(path) > used.manifest.step:
                aside = path.with_name(f"{path.name}.damaged")
                if aside.exists():
                    remove(aside)
                path.rename(aside)
                self._say(f"checkpoint: {path.name} was put aside as {aside.name}")


def load(saved: Saved, algorithm: Algorithm, data: DataSource, learners: Learners) -> RunState:
    """Put a checkpoint into all parts of a run."""
    content = json.loads((saved.folder / STATE_FILE).read_bytes())
    learners.load(saved.learner_files)
    algorithm.load_state_dict(content["algorithm"])
    data.load_state_dict(content["data"])
    return RunState.from_json(content["run"])


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def check_visible(path: Path, size: int) -> None:
    """A rank on another node may have written into a folder of the same name that only it sees."""
    found = path.stat().st_size if path.exists() else None
    if found != size:
        state = "is not there" if found is None else f"has {found} bytes"
        raise CheckpointError(
            f"{path}: a learner rank wrote {size} bytes, and here it {state}. Put run.dir on a file system that every "
            "node shares"
        )


def remove(path: Path) -> None:
    """A folder, out of sight at once, or a file."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    gone = path.with_name(f".{path.name.lstrip('.')}.{secrets.token_hex(4)}.removed")
    path.rename(gone)
    shutil.rmtree(gone)
