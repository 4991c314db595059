"""Named points where a test can make a process end, stop or fail; without the environment variable they do nothing.

PLAIT_FAILPOINT=ACTION:NAME[:N] strikes when NAME is reached for the N-th time in a process (the first by default):
`kill` (SIGKILL), `stop` (SIGSTOP), `term` (SIGTERM), `interrupt` (SIGINT), `sleep` (an hour), `raise` (RuntimeError),
`full` (OSError: no space left on device) or `memory` (MemoryError at a limit of the address space). Where
PLAIT_FAILPOINT_ONCE names a file, only one of many processes strikes: the one that renames it to FILE.struck.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from collections import Counter
from pathlib import Path

VARIABLE = "PLAIT_FAILPOINT"
ONCE = "PLAIT_FAILPOINT_ONCE"

_reached = Counter[str]()


def reach(name: str) -> None:
    """Say that the process has come to the point `name`, for example "checkpoint.renamed"."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    action, _, place = wanted.partition(":")
    place, _, number = place.partition(":")
    if place != name:
        return
    _reached[name] += 1
    if _reached[name] == int(number or 1) and is_first():
        strike(action, name)


def is_first() -> bool:
    once = os.environ.get(ONCE)
    if once is None:
        return True
    try:
        os.rename(once, f"{once}.struck")
    except FileNotFoundError:
        return False
    return True


def strike(action: str, name: str) -> None:
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        case "sleep":
            time.sleep(3600)
        case "memory":
            run_out_of_memory()
        case "raise":
            raise RuntimeError(f"{VARIABLE}: {name} was reached")
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        case _:
            raise ValueError(
                f"{VARIABLE}: {action!r} is not kill, stop, term, interrupt, sleep, memory, raise or full"
            )


def run_out_of_memory() -> None:
    """Raises MemoryError, as any allocation may that follows."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used, used))
    bytearray(2**31)
