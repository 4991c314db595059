"""One scoring process as the driver sees it: start, load functions, send samples ahead, collect scores, kill.

Not thread-safe, and bound to the thread that created it: the kernel kills the process when that thread ends.
"""

import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..engine import guard
from ..engine.errors import ConfigError
from ..engine.types import Score
from .frames import (
    TICKET_BYTES,
    Load,
    RewardSource,
    Task,
    pack_message,
    pack_ticket,
    take_reply,
    unpack_score,
    unpack_tickets,
)

START_SECONDS = 60.0
"""Deadline for starting the interpreter and importing a reward function."""
ACCEPT_SECONDS = 10.0
"""Deadline for an idle process to begin with a sample."""
MAX_PROCESSES = 64
"""More processes than this, started by one reward function, are taken for a fork bomb."""
_MAX_AHEAD_BYTES = 32768
"""Sent and not yet graded: less than a pipe holds, so that sending does not wait."""
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
    """The process died, or has to."""

    def __init__(self, reason: str, *, from_outside: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.from_outside = from_outside
        """Somebody, or the kernel, may have ended it whatever it was grading."""


class Cancelled(Exception):
    """The scorer is closing."""


@dataclass(frozen=True, slots=True)
class Graded:
    id: int
    score: Score
    seconds: float
    """Of the call."""
    last: bool
    """The process has retired after it."""


class ScoringProcess:
    """`cancelled` is asked every few milliseconds while waiting; `mark` is unique to this process.

    Raises OSError when the machine cannot start another process.
    """

    def __init__(
        self, mark: str, working_dir: str, max_memory_mib: int, cancelled: Callable[[], bool]
    ) -> None:
        self.loaded: set[RewardSource] = set()
        self._mark = mark
        self._cancelled = cancelled
        self._next_id = 0
        self._ahead: dict[int, int] = {}
        """Bytes of each message that has no reply yet, by id, in the order sent."""
        self._progress = self._begun = 0.0
        """When the oldest of them was next, and when it was seen to have begun (0: it was not)."""
        self._unsent: list[tuple[int, bytes]] = []
        self._lost: Lost | None = None
        """Why nothing more can come; raised when what came before has been handed out."""
        self._buffer = bytearray()
        self._output = bytearray()
        pipes = [os.pipe() for _ in range(4)]
        requests, tickets, replies, printed = pipes
        self._requests, self._tickets = requests[1], tickets[1]
        self._replies, self._printed = replies[0], printed[0]
        # A file description of its own: reading back must not wait, the process's own reading must.
        self._untaken = os.open(f"/proc/self/fd/{tickets[0]}", os.O_RDONLY | os.O_NONBLOCK)
        theirs = {"requests": requests[0], "tickets": tickets[0], "replies": replies[1]}
        start = {
            "path": [working_dir, *map(os.path.abspath, sys.path)],
            "driver": os.getpid(),
            "max_memory": max_memory_mib << 20,
            **theirs,
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOTSTRAP, json.dumps(start)],
                cwd=working_dir,
                env=_environment(mark),
                stdin=subprocess.DEVNULL,
                stdout=printed[1],
                stderr=printed[1],
                pass_fds=tuple(theirs.values()),
                start_new_session=True,
            )
        except BaseException:
            self._close_pipes()
            raise
        finally:
            for fd in (*theirs.values(), printed[1]):
                os.close(fd)
        for fd in (self._requests, self._replies, self._printed):
            os.set_blocking(fd, False)
        self._poll = select.poll()
        self._poll.register(self._replies, select.POLLIN)
        self._poll.register(self._printed, select.POLLIN)
        self._tasks = _tasks_on_machine()

    def load(self, source: RewardSource) -> None:
        """Import a reward function, once; nothing may be outstanding.

        Raises ConfigError at `source.path` when that fails, Lost when it kills the process or takes more than 60 s.
        """
        if source in self.loaded:
            return
        deadline = time.monotonic() + START_SECONDS
        message = Load(self._new_id(), source)
        self._add(message.id, pack_message(message))
        self.flush()
        while not (replies := self._receive()):
            if time.monotonic() > deadline:
                raise Lost(f"importing it took more than {START_SECONDS:g} s")
        self._ahead.clear()
        if replies[0].get("event") != "loaded":
            raise ConfigError.at(source.path, source.name, str(replies[0].get("message")))
        self.loaded.add(source)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def has_room(self) -> bool:
        """Whether another sample can be sent without waiting for the process."""
        return sum(self._ahead.values()) < _MAX_AHEAD_BYTES

    def submit(self, source: RewardSource, prompt: bytes, completion: str) -> int:
        """Take one sample for a loaded function; `flush` sends it. Returns the id that its score will have."""
        task = Task(self._new_id(), source, prompt, completion)
        self._add(task.id, pack_message(task))
        return task.id

    def flush(self) -> None:
        """Send what was submitted, tickets first: a long message passes only while the process reads it."""
        if not self._unsent:
            return
        os.write(self._tickets, b"".join(pack_ticket(message_id) for message_id, _ in self._unsent))
        data = b"".join(message for _, message in self._unsent)
        self._unsent.clear()
        deadline = time.monotonic() + ACCEPT_SECONDS
        view = memoryview(data)
        writable = select.poll()
        writable.register(self._requests, select.POLLOUT)
        while view:
            if self._cancelled():
                raise Cancelled
            if time.monotonic() > deadline:
                self._lost = Lost(f"no process took it within {ACCEPT_SECONDS:g} s")
                return
            try:
                view = view[os.write(self._requests, view) :]
            except BlockingIOError:
                # A full pipe of prints or of replies may be what it waits for.
                self._read_output()
                self._buffer += self._read_replies()
                writable.poll(_TICK_SECONDS * 1000)
            except BrokenPipeError:
                return  # it is dead: `_receive` says how, after its last replies

    def collect(self, timeout_seconds: float) -> list[Graded]:
        """Scores that are there, in the order of their samples; after at most 50 ms none.

        Raises Lost when a sample killed the process, or has run for more than `timeout_seconds`.
        """
        replies = self._receive()
        if not replies:
            self._check_running(timeout_seconds)
        graded = []
        for reply in replies:
            try:
                graded.append(self._graded(reply))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                self._lost = _garbled(error)
                break
        return graded

    def running_seconds(self) -> float:
        """For how long the oldest sample has been seen to run."""
        return time.monotonic() - self._begun if self._begun else 0.0

    def take_back(self) -> list[int]:
        """The ids of the samples that the process has not begun with, and from now on never will."""
        data = bytearray()
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._untaken, 4096):
                data += piece
        ids = unpack_tickets(bytes(data))
        for message_id in ids:
            del self._ahead[message_id]
        return ids

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

    def _add(self, message_id: int, data: bytes) -> None:
        if not self._ahead:
            self._progress, self._begun, self._tasks = time.monotonic(), 0.0, _tasks_on_machine()
        self._ahead[message_id] = len(data)
        self._unsent.append((message_id, data))

    def _receive(self) -> list[dict[str, Any]]:
        """Whole replies to what was sent, waiting for one tick at most. Raises Lost when the process is dead."""
        if self._cancelled():
            raise Cancelled
        if found := self._take_replies():
            return found
        if self._lost is not None:
            raise self._lost
        until = time.monotonic() + _TICK_SECONDS
        events = dict(self._poll.poll(_TICK_SECONDS * 1000))
        while self._printed in events:
            self._read_output()
            if self._replies in events or time.monotonic() > until:
                break
            events = dict(self._poll.poll(_TICK_SECONDS * 1000))
        # Its end of the pipe may outlive the process in a child, so ask for the process itself as well.
        dead = not events and self._process.poll() is not None
        if self._replies in events or dead:
            data = self._read_replies()
            if not data:
                raise self._died()
            self._buffer += data
        return self._take_replies()

    def _take_replies(self) -> list[dict[str, Any]]:
        """Replies to anything but what is outstanding are not ours: something else wrote them."""
        found = []
        while (reply := self._next_reply()) is not None:
            if reply.get("id") in self._ahead:
                found.append(reply)
        return found

    def _next_reply(self) -> dict[str, Any] | None:
        if self._lost is not None:
            return None
        try:
            return take_reply(self._buffer)
        except ValueError as error:
            self._lost = _garbled(error)
            return None

    def _graded(self, reply: dict[str, Any]) -> Graded:
        score, seconds = unpack_score(reply), float(reply["seconds"])
        graded = Graded(reply["id"], score, seconds, bool(reply["last"]))
        del self._ahead[graded.id]
        self._progress, self._begun = time.monotonic(), 0.0
        return graded

    def _check_running(self, timeout_seconds: float) -> None:
        """Nothing came for a tick: is the oldest sample past its deadline, or starting processes without end?"""
        now = time.monotonic()
        if not self._begun:
            waiting = bytearray(4)
            fcntl.ioctl(self._untaken, termios.FIONREAD, waiting)
            untaken = int.from_bytes(waiting, sys.byteorder) // TICKET_BYTES
            if untaken < len(self._ahead):
                self._begun = now - _TICK_SECONDS
            elif now - self._progress > ACCEPT_SECONDS:
                raise Lost(f"no process took it within {ACCEPT_SECONDS:g} s")
        elif now - self._begun > timeout_seconds:
            raise Lost(f"deadline of {timeout_seconds:g} s exceeded")
        self._check_descendants()

    def _check_descendants(self) -> None:
        """Catch a fork bomb early. Limits by user (RLIMIT_NPROC) would count the trainer, and spare root.

        Scanning /proc costs milliseconds, so it waits until the whole machine has many more tasks than before.
        """
        tasks = _tasks_on_machine()
        if tasks <= self._tasks + MAX_PROCESSES:
            self._tasks = min(self._tasks, tasks)
        elif guard.group_size(self._process.pid) > MAX_PROCESSES:
            raise Lost(f"started more than {MAX_PROCESSES} processes")
        else:
            self._tasks = tasks

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
        reason = f"the process was killed by {signal.Signals(-code).name}{hint}{said}"
        return Lost(reason, from_outside=code == -signal.SIGKILL)

    def _close_pipes(self) -> None:
        for fd in (
            self._requests,
            self._tickets,
            self._untaken,
            self._replies,
            self._printed,
        ):
            os.close(fd)


def _garbled(error: Exception) -> Lost:
    return Lost(f"the function wrote into the pipe of replies ({error})")


def _environment(mark: str) -> dict[str, str]:
    """The driver's own and the mark; numerical libraries get one thread unless the user chose a number.

    Their threads would take cores from generation. Fewer malloc arenas: each reserves 64 MiB of address space.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**threads, "MALLOC_ARENA_MAX": "2", **os.environ, guard.SCORING: mark}


def _tasks_on_machine() -> int:
    """Processes and threads that exist now; one small read."""
    with open("/proc/loadavg", "rb") as file:
        return int(file.read().split()[3].partition(b"/")[2])
