"""Runs a program in a sandbox of its own: no network, few rights, limits on everything, and nothing left behind.

`isolation`:

    "namespaces"  the kernel's namespaces (sandbox_launcher.py): no network, not even the machine's own; no other
                  process to see or signal; no file but the Python installation and system libraries, read-only,
                  and an empty folder in memory. Where the machine does not allow it, or runs a Linux before 5.12:
                  SandboxError.
    "limits"      what any machine has: the limits, an empty environment and a temporary folder. Network, files and
                  processes of this user stay within reach. For code that is trusted or a container that is thrown away.

Both: limits on CPU time, address space (of each process), file size, open files, core files and, unless root runs it
with "limits", on processes; an own session; killed with its parent, at its deadline, or when it prints too much.
Not hidden: the kernel itself, time, the number of cores, and how loaded they are.
"""

import contextlib
import json
import math
import os
import random
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from ..engine import guard
from . import sandbox_launcher

Isolation = Literal["namespaces", "limits"]
START_SECONDS = 5.0
"""Deadline for building the sandbox and starting the interpreter in it."""
MAX_REPLY_BYTES = 1 << 20
_VISIBLE = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")


class SandboxError(Exception):
    """The sandbox itself failed; nothing is known about the code."""


@dataclass(frozen=True, slots=True)
class Limits:
    seconds: float
    memory_mib: int = 512
    output_bytes: int = 1 << 20
    disk_mib: int = 16
    processes: int = 32

    def rlimits(self) -> dict[str, int]:
        seconds = math.ceil(self.seconds) + 1
        return {
            "RLIMIT_CPU": seconds,
            "RLIMIT_AS": self.memory_mib << 20,
            "RLIMIT_FSIZE": self.disk_mib << 20,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_NOFILE": 256,
            "RLIMIT_CORE": 0,
        }


@dataclass(slots=True)
class Outcome:
    """What a program did. `exit_code` is None where it was killed by us: `stopped` tells why."""

    output: bytes = b""
    replies: list[bytes] = field(default_factory=list)
    exit_code: int | None = None
    stopped: str = ""


def run(
    kind: Literal["script", "module"],
    code: str,
    limits: Limits,
    isolation: Isolation,
    *,
    stdin: bytes = b"",
    tests: tuple[str, ...] = (),
) -> Outcome:
    """Run `code` as a script with `stdin`, or as a module and then `tests` (sandbox_harness.py).

    `replies` holds one line `INDEX 1` or `INDEX 0` a test that ended. Raises SandboxError.
    """
    with tempfile.TemporaryDirectory(prefix="plait-sandbox-", ignore_cleanup_errors=True) as folder:
        program = _Program(folder, limits, isolation)
        try:
            return program.converse(kind, code, stdin, tests)
        finally:
            program.kill()


class _Program:
    """One launcher with the program under it, and our ends of its pipes."""

    def __init__(self, folder: str, limits: Limits, isolation: Isolation) -> None:
        self._limits = limits
        self._isolation = isolation
        self._mark = f"{os.environ.get(guard.SCORING, '')}/{secrets.token_hex(8)}"
        towards = ("job", "stdin", "requests")
        pipes = {name: os.pipe() for name in (*towards, "stdout", "replies", "status")}
        theirs = {name: pipe[name not in towards] for name, pipe in pipes.items()}
        self._ours = {name: pipe[name in towards] for name, pipe in pipes.items()}
        job = self._job(folder, theirs)
        command = [sys.executable, "-I", "-S", sandbox_launcher.__file__]
        try:
            self._process = subprocess.Popen(
                [*command, str(theirs["job"]), str(theirs["status"])],
                cwd=folder,
                env={guard.SCORING: self._mark},
                stdin=theirs["stdin"],
                stdout=theirs["stdout"],
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs[name] for name in ("job", "status", "requests", "replies")],
                start_new_session=True,
            )
        except OSError as error:
            _close(self._ours)
            raise SandboxError(f"the sandbox cannot start: {error}") from error
        finally:
            _close(theirs)
        for fd in self._ours.values():
            os.set_blocking(fd, False)
        self._out = {"job": bytearray(job), "stdin": bytearray(), "requests": bytearray()}
        self._in = {name: bytearray() for name in ("stdout", "replies", "status")}

    def _job(self, folder: str, theirs: dict[str, int]) -> bytes:
        # Never the number of a pipe that the launcher still needs: it would be closed under it.
        free = sorted({*range(64, 250)} - {*theirs.values()})
        inside = random.SystemRandom().sample(free, 2)
        descriptors = [theirs["requests"], theirs["replies"]]
        namespaces = self._isolation == "namespaces"
        job = {
            "parent": os.getpid(),
            "namespaces": namespaces,
            "folder": folder,
            "visible": _visible(),
            "disk": self._limits.disk_mib << 20,
            "limits": self._limits.rlimits(),
            "descriptors": list(zip(descriptors, inside, strict=True)),
            "program": [sys.executable, "-I", "-c", _harness(), *map(str, inside)],
            "environment": _environment(self._mark, "/plait" if namespaces else folder),
        }
        return json.dumps(job).encode()

    def converse(self, kind: str, code: str, stdin: bytes, tests: tuple[str, ...]) -> Outcome:
        """Feed the program and gather what it says until it has ended or has to be stopped."""
        token = secrets.token_hex(16)
        replies, status = self._in["replies"], self._in["status"]
        self._out["stdin"] += stdin
        self._out["requests"] += _frames(kind, code)
        late = _frames(token, str(len(tests)), *tests)  # sent when the code has run
        up, stopped = False, ""
        deadline = time.monotonic() + START_SECONDS
        while "status" in self._ours and b"exit" not in status and not stopped:
            if not up and replies.startswith(b"up\n"):
                up, deadline = True, time.monotonic() + self._limits.seconds
            if late and replies.startswith(b"up\nran\n"):
                self._out["requests"] += late
                late = b""
            self._exchange(deadline - time.monotonic())
            stopped = self._overstepped(deadline)
        if not stopped:
            self._exchange(0)
            stopped = self._overstepped(math.inf)
        code_ = self._exit_code(stopped, replies.startswith(b"up\n"))
        mine = f"{token} ".encode()
        lines = [
            line.removeprefix(mine) for line in bytes(replies).splitlines() if line.startswith(mine)
        ]
        return Outcome(bytes(self._in["stdout"]), lines, code_, stopped)

    def _overstepped(self, deadline: float) -> str:
        if len(self._in["stdout"]) > self._limits.output_bytes:
            return "output"
        if len(self._in["replies"]) > MAX_REPLY_BYTES:
            return "replies"
        return "deadline" if time.monotonic() > deadline else ""

    def _exchange(self, seconds: float) -> None:
        """Wait for something to read or write, and do it."""
        poll = select.poll()
        names = {fd: name for name, fd in self._ours.items()}
        for fd, name in names.items():
            if name in self._in:
                poll.register(fd, select.POLLIN)
            elif self._out[name]:
                poll.register(fd, select.POLLOUT)
            elif name != "requests":
                self._end(name)  # the reader sees the end of the stream
        for fd, _ in poll.poll(max(0.0, seconds) * 1000):
            self._move(names[fd], fd)

    def _move(self, name: str, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            if name in self._out:
                try:
                    del self._out[name][: os.write(fd, self._out[name][:65536])]
                except BrokenPipeError:
                    self._end(name)
                return
            while data := os.read(fd, 1 << 20):
                self._in[name] += data
                if self._overstepped(math.inf):
                    return
            self._end(name)

    def _end(self, name: str) -> None:
        os.close(self._ours.pop(name))

    def _exit_code(self, stopped: str, up: bool) -> int | None:
        """The program's exit code, None where it was stopped. Raises SandboxError where the sandbox failed."""
        lines = self._in["status"].decode(errors="replace").splitlines()
        failed = [line.partition(" ")[2] for line in lines if line.startswith("failed")]
        if failed:
            raise SandboxError(
                f"isolation: {self._isolation} cannot be had here: {failed[0]}; allow user namespaces, "
                "or set the option isolation: limits, which leaves network and files within reach of the code"
            )
        codes = [int(line.partition(" ")[2]) for line in lines if line.startswith("exit")]
        if not up:
            how = f"ended with exit code {codes[0]}" if codes else f"took {START_SECONDS:g} s"
            raise SandboxError(f"the interpreter did not start in the sandbox: it {how}")
        if codes or stopped or self._isolation == "limits":
            return codes[0] if codes and not stopped else None
        raise SandboxError("the sandbox was killed from outside")

    def kill(self) -> None:
        """Kill everything that runs in the sandbox, and close the pipes."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # not reaped yet, so the number is its own
        self._process.wait()
        if self._isolation == "limits":  # with namespaces the kernel has killed them all
            guard.kill_marked(self._mark)
        _close(self._ours)


def _close(descriptors: dict[str, int]) -> None:
    for fd in descriptors.values():
        os.close(fd)


def _frames(*texts: str) -> bytes:
    encoded = [text.encode("utf-8", "replace") for text in texts]
    return b"".join(len(text).to_bytes(4, "big") + text for text in encoded)


@cache
def _harness() -> str:
    return Path(__file__).with_name("sandbox_harness.py").read_text()


@cache
def _visible() -> list[str]:
    """Folders that the interpreter and its extension modules need, none inside another."""
    python = {sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parent.parent)}
    paths = sorted(python | set(_VISIBLE))
    return [p for p in paths if not any(p.startswith(f"{other}/") for other in paths)]


def _environment(mark: str, home: str) -> dict[str, str]:
    """Nothing of plait's own but the mark by which its guard finds what is left over."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    paths = {"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8"}
    return {**threads, **paths, guard.SCORING: mark}
