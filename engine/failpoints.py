"""Named points where a test can make a process end, stop or fail; without the environment variable they do nothing.

PLAIT_FAILPOINT=ACTION:NAME[:N] strikes when NAME is reached for the N-th time in a process (the first by default):
`kill` (SIGKILL), `stop` (SIGSTOP), `term` (SIGTERM), `interrupt` (SIGINT), `raise` (RuntimeError) or `full`
(OSError: no space left on device).
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter

VARIABLE = "PLAIT_FAILPOINT"

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
    if _reached[name] == int(number or 1):
        strike(action, name)


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
        case "raise":
            raise RuntimeError(f"{VARIABLE}: {name} was reached")
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        case _:
            raise ValueError(
                f"{VARIABLE}: {action!r} is not kill, stop, term, interrupt, raise or full"
            )
