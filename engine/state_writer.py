"""Writes a snapshot while training goes on; one at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from threading import Thread

from .durable import DOING, FileRecord, storage_errors, write_tensors
from .errors import CheckpointError
from .failpoints import reach
from .learner_state import Snapshot

HEADROOM = 1.01
"""Of a snapshot's size: headers, and the small files beside it."""


class StateWriter:
    """A thread of this rank's process and what came of it."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._record: FileRecord | None = None
        self._error: Exception | None = None

    def start(self, path: Path, snapshot: Snapshot, num_ranks: int) -> None:
        """Write `snapshot` to a new file; `num_ranks` of about this size share the disk.

        Raises CheckpointError where they do not fit, before anything is written.
        """
        if self._thread is not None and self._thread.is_alive():
            raise CheckpointError("a snapshot was taken before the one before it was written")
        with storage_errors(path, DOING):
            path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(path.parent).free
        needed = int(snapshot.num_bytes * num_ranks * HEADROOM)
        if needed > free:
            raise CheckpointError(
                f"{DOING}: it takes {needed / 1e6:.0f} MB and {path.parent} has {free / 1e6:.0f} MB free. Make room, "
                "or choose another run.dir; what was saved before is untouched"
            )
        self._record = self._error = None
        self._thread = Thread(target=self._write, args=(path, snapshot), daemon=True)
        self._thread.start()

    def _write(self, path: Path, snapshot: Snapshot) -> None:
        try:
            with storage_errors(path, DOING):
                reach("checkpoint.learner_begun")
                self._record = write_tensors(path, snapshot.tensors, snapshot.facts)
        except Exception as error:  # noqa: BLE001 (raised where the loop asks)
            self._error = error

    def finished(self, *, wait: bool) -> FileRecord | None:
        """The file, or None while it is being written; raises what the writing ended with, as often as it is asked."""
        if self._thread is None:
            raise CheckpointError("no snapshot was taken")
        if wait:
            self._thread.join()
        if self._thread.is_alive():
            return None
        if self._error is not None:
            raise self._error
        return self._record
