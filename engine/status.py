"""RUN/status.json: what the run does and what it waits for, rewritten each second; and the end of a run that is stuck.

Every wait of a run has a deadline of its own, which ends in an error that names who is late. Whatever none of them
covers (a file system that hangs, a library that waits for ever) is caught here: when nothing has changed for
`loop.stall_seconds`, one line tells what is waited for, and the process ends.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from .errors import Stalled
from .metrics import RunLog

STATUS_FILE = "status.json"
_SECONDS = 1.0
_TIMES = ("seconds", "where")
"""Words in the names of what changes by itself."""

Rows = Sequence[Mapping[str, Any]]


class Role(Protocol):
    """The pool of rollout workers, or the learner."""

    def status(self) -> Rows: ...


def end_process(message: str) -> None:
    """For one whose main thread may never run again; guards and Ray end what it started."""
    print(f"error: Stalled: {message}", file=sys.stderr, flush=True)
    os._exit(Stalled.exit_code)


class StatusFile:
    """A thread of the driver that writes the file, and watches whether anything moves."""

    def __init__(
        self,
        log: RunLog,
        rollouts: Role,
        learners: Role,
        stall_seconds: float,
        stalled: Callable[[str], None] = end_process,
    ) -> None:
        """`stalled` gets the line about a run that is stuck, on this object's thread."""
        self._log, self._rollouts, self._learners = log, rollouts, learners
        self._limit, self._stalled = stall_seconds, stalled
        self._moved, self._last = time.monotonic(), ""
        self._out_of_date = False
        self._told: set[str] = set()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="plait-status", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._write({"phase": "ended", "step": self._log.at.step})

    def _run(self) -> None:
        while not self._closed.wait(_SECONDS):
            now = self.now()
            self._write(now)
            self._tell_losses(now["learner_ranks"])
            moving = json.dumps(without_times(now))
            if moving != self._last:
                self._moved, self._last = time.monotonic(), moving
            elif time.monotonic() - self._moved > self._limit:
                self._stalled(
                    f"nothing moved for loop.stall_seconds = {self._limit:g}: "
                    f"step {now['step']}, {now['phase']}, waits for {now['waits_for']}"
                )
                return

    def _tell_losses(self, ranks: Rows) -> None:
        """Of ranks that nobody calls: their next call, which starts them again, may be far off."""
        for row in ranks:
            if not (lost := row.get("lost")):
                continue
            line = (
                f"learner rank {row['rank']} died: {lost}; all ranks start again at their next call"
            )
            if line not in self._told:
                self._told.add(line)
                self._log.console.say(line)

    def now(self) -> dict[str, Any]:
        at = self._log.at
        workers, ranks = list(self._rollouts.status()), list(self._learners.status())
        return {
            "phase": at.phase,
            "step": at.step,
            "phase_seconds": round(time.monotonic() - at.since, 1),
            "samples": at.samples,
            "waits_for": waits_for(at.phase, workers, ranks),
            "rollout_workers": workers,
            "learner_ranks": ranks,
        }

    def _write(self, content: Mapping[str, Any]) -> None:
        path = self._log.folder / STATUS_FILE
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(json.dumps(content, indent=1) + "\n")
            partial.replace(path)
            self._out_of_date = False
        except OSError as error:
            # A full disk must not end a run that could go on: the checkpoint decides that.
            if not self._out_of_date:
                self._log.console.say(f"{path} is out of date: {error}")
            self._out_of_date = True


def without_times(value: Any) -> Any:
    """What changes only when something happens."""
    if isinstance(value, Mapping):
        return {
            key: without_times(item)
            for key, item in value.items()
            if not any(word in key for word in _TIMES) and key != "waits_for"
        }
    return [without_times(item) for item in value] if isinstance(value, list) else value


def waits_for(phase: str, workers: Rows, ranks: Rows) -> str:
    """The one prompt, worker or rank that a phase cannot end without."""
    if phase in ("rollout", "eval"):
        owing = [row for row in workers if "oldest" in row]
        if owing:
            first = max(owing, key=lambda row: row["oldest_seconds"])
            return f"{first['oldest']} at {first['name']} for {first['oldest_seconds']:g} s"
        idle = [row for row in workers if row["state"] != "serves"]
        if idle:
            return f"{idle[0]['name']}, which {idle[0]['state']} for {idle[0]['seconds']:g} s"
        return "the scorer"
    busy = [row for row in ranks if row["method"]]
    if busy:
        late = min(busy, key=lambda row: (row["in_collective"], -row["seconds"]))
        return f"learner rank {late['rank']}: {late['method']} for {late['seconds']:g} s, {late['where']}"
    return f"this process ({phase})"
