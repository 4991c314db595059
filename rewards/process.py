"""One scoring process as the driver sees it: start, load a function, grade, kill.

Not thread-safe, and bound to the thread that created it: the kernel kills the process when that thread ends.
"""

import contextlib
import json
import logging
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from ..engine.errors import ConfigError
from ..engine.types import Score
from . import guard
from .frames import Load, RewardSource, Task, pack_message, take_reply, unpack_score

START_SECONDS = 60.0
"""Deadline for starting the interpreter and importing a reward function."""
ACCEPT_SECONDS = 10.0
"""Deadline for an idle process to accept a sample."""
MAX_PROCESSES = 64
"""More processes than this, started by one reward function, are taken for a fork bomb."""
_TICK_SECONDS = 0.05
_KEPT_OUTPUT_BYTES = 4096

# Runs before anything is imported from the user's folder, which sys.path may hold.
_BOOTSTRAP = """
import json, sys
start = json.loads(sys.argv[1])
sys.path[:] = start.pop("path")
from plait.rewards.worker import main
main(**start)
"""

logger = logging.getLogger(__name__)


class Lost(Exception):
    """The process died, or has to. `accepted` tells whether it had begun with the sample."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.accepted = False


class Cancelled(Exception):
    """The scorer is closing."""


class ScoringProcess:
    """`cancelled` is asked every few milliseconds while waiting; `mark` is unique to this process.

    Raises OSError when the machine cannot start another process.
    """

    def __init__(
        self, mark: str, working_dir: str, max_memory_mib: int, cancelled: Callable[[], bool]
    ) -> None:
        self._mark = mark
        self._cancelled = cancelled
        self._next_id = 0
        self._loaded: set[RewardSource] = set()
        self._buffer = bytearray()
        self._output = bytearray()
        pipes = [os.pipe() for _ in range(3)]
        (requests, self._requests), (self._replies, replies), (self._printed, printed) = pipes
        start = {
            "path": [working_dir, *map(os.path.abspath, sys.path)],
            "driver": os.getpid(),
            "requests": requests,
            "replies": replies,
            "max_memory": max_memory_mib << 20,
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOTSTRAP, json.dumps(start)],
                cwd=working_dir,
                env=_environment(mark),
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                pass_fds=(requests, replies),
                start_new_session=True,
            )
        except BaseException:
            self._close_pipes()
            raise
        finally:
            for fd in (requests, replies, printed):
                os.close(fd)
        for fd in (self._requests, self._replies, self._printed):
            os.set_blocking(fd, False)
        self._poll = select.poll()
        self._poll.register(self._replies, select.POLLIN)
        self._poll.register(self._printed, select.POLLIN)

    def load(self, source: RewardSource) -> None:
        """Import a reward function, once.

        Raises ConfigError at `source.path` when that fails, Lost when it kills the process or takes more than 60 s.
        """
        if source in self._loaded:
            return
        deadline = time.monotonic() + START_SECONDS
        message = Load(self._new_id(), source)
        self._send(pack_message(message), deadline)
        reply = self._receive(
            message.id, deadline, f"importing it took more than {START_SECONDS:g} s"
        )
        if reply["event"] != "loaded":
            raise ConfigError.at(source.path, source.name, str(reply.get("message")))
        self._loaded.add(source)

    def grade(
        self, source: RewardSource, prompt: bytes, completion: str, timeout_seconds: float
    ) -> tuple[Score, bool]:
        """The score of one sample by a loaded function, and whether the process has retired after it.

        Raises Lost when the sample killed the process or its deadline passed.
        """
        task = Task(self._new_id(), source, prompt, completion)
        accept = time.monotonic() + ACCEPT_SECONDS
        self._send(pack_message(task), accept)
        self._receive(task.id, accept, f"no process took it within {ACCEPT_SECONDS:g} s")
        deadline = time.monotonic() + timeout_seconds
        try:
            reply = self._receive(task.id, deadline, f"deadline of {timeout_seconds:g} s exceeded")
            return unpack_score(reply), bool(reply["last"])
        except Lost as lost:
            lost.accepted = True
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._garbled(error) from error

    def kill(self) -> None:
        """Kill the process, its group and all descendants; release everything."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._process.poll() is None:  # else the group's number may belong to someone else
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        guard.kill_marked(self._mark)
        self._read_output()
        if self._output:
            logger.debug(
                "scoring process %d printed: %s",
                self._process.pid,
                self._output.decode(errors="replace"),
            )
        self._close_pipes()

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        writable = select.poll()
        writable.register(self._requests, select.POLLOUT)
        while view:
            self._check(deadline, f"no process took it within {ACCEPT_SECONDS:g} s")
            try:
                view = view[os.write(self._requests, view) :]
            except BlockingIOError:
                self._read_output()  # a full pipe of prints may be what it waits for
                writable.poll(_TICK_SECONDS * 1000)
            except BrokenPipeError:
                raise self._died() from None

    def _receive(self, message_id: int, deadline: float, late: str) -> dict[str, Any]:
        """The next reply to `message_id`; replies to anything else are stale and dropped."""
        baseline = _tasks_on_machine()
        while True:
            try:
                while (reply := take_reply(self._buffer)) is not None:
                    if reply.get("id") == message_id:
                        return reply
            except ValueError as error:
                raise self._garbled(error) from error
            left = self._check(deadline, late)
            events = dict(self._poll.poll(math.ceil(min(left, _TICK_SECONDS) * 1000)))
            if self._printed in events:
                self._read_output()
            # Its end of the pipe may outlive the process in a child, so ask for the process itself as well.
            dead = not events and self._process.poll() is not None
            if self._replies in events or dead:
                data = self._read_replies()
                if not data:
                    raise self._died()
                self._buffer += data
            elif not events:
                baseline = self._check_descendants(baseline)

    def _check(self, deadline: float, late: str) -> float:
        """Seconds left. Raises Cancelled or Lost."""
        if self._cancelled():
            raise Cancelled
        left = deadline - time.monotonic()
        if left <= 0:
            raise Lost(late)
        return left

    def _check_descendants(self, baseline: int) -> int:
        """Catch a fork bomb early. Limits by user (RLIMIT_NPROC) would count the trainer, and spare root.

        Scanning /proc costs milliseconds, so it waits until the whole machine has many more tasks than before.
        """
        tasks = _tasks_on_machine()
        if tasks <= baseline + MAX_PROCESSES:
            return min(baseline, tasks)
        if guard.group_size(self._process.pid) > MAX_PROCESSES:
            raise Lost(f"started more than {MAX_PROCESSES} processes")
        return tasks

    def _read_replies(self) -> bytes:
        with contextlib.suppress(BlockingIOError):
            return os.read(self._replies, 65536)
        return b""

    def _read_output(self) -> None:
        with contextlib.suppress(BlockingIOError):
            printed = os.read(self._printed, 1 << 20)
            if not printed:  # closed by the function: from now on the poll would return at once
                with contextlib.suppress(KeyError):
                    self._poll.unregister(self._printed)
            self._output += printed
        del self._output[:-_KEPT_OUTPUT_BYTES]

    def _died(self) -> Lost:
        """How the process ended, with the last line it printed."""
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return Lost("the process closed its pipe of replies")
        self._read_output()
        lines = self._output.decode(errors="replace").strip().splitlines()
        said = f"; it printed last: {lines[-1][-200:]}" if lines else ""
        if code >= 0:
            return Lost(f"the process ended with exit code {code}{said}")
        hint = " (the kernel does this when memory runs out)" if code == -signal.SIGKILL else ""
        return Lost(f"the process was killed by {signal.Signals(-code).name}{hint}{said}")

    def _garbled(self, error: Exception) -> Lost:
        lost = Lost(f"the function wrote into the pipe of replies ({error})")
        lost.accepted = True
        return lost

    def _close_pipes(self) -> None:
        for fd in (self._requests, self._replies, self._printed):
            os.close(fd)


def _environment(mark: str) -> dict[str, str]:
    """The driver's own and the mark; numerical libraries get one thread unless the user chose a number.

    Their threads would take cores from generation. Fewer malloc arenas: each reserves 64 MiB of address space.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**threads, "MALLOC_ARENA_MAX": "2", **os.environ, guard.MARK: mark}


def _tasks_on_machine() -> int:
    """Processes and threads that exist now; one small read."""
    with open("/proc/loadavg", "rb") as file:
        return int(file.read().split()[3].partition(b"/")[2])
