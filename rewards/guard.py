"""Find and kill what scoring processes leave behind, also after the driver itself was killed.

Every scoring process carries a mark in its environment, which all its descendants inherit: in other process groups and
sessions too. Linux only, as it reads /proc. Run as a program (`python guard.py MARK`) this file is the guard of one
scorer: it waits until its standard input closes or the driver is gone, then kills everything that bears the mark. It
imports only the standard library, so it starts in milliseconds.
"""

import contextlib
import os
import select
import signal
import sys
import time

MARK = "PLAIT_SCORING_PROCESS"
_CHECK_SECONDS = 0.5


def marked(mark: str) -> list[int]:
    """Pids of living processes whose mark starts with `mark`."""
    needle = f"\0{MARK}={mark}".encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        # A process may end meanwhile (OSError), or belong to someone else (PermissionError).
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if needle in b"\0" + file.read():
                found.append(int(name))
    return found


def group_size(group: int) -> int:
    """Number of processes in a process group. Reads no files, since those of a forking process block for long."""
    count = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(ValueError, OSError):  # not a process, or one that just ended
            count += os.getpgid(int(name)) == group
    return count


def kill_marked(mark: str) -> None:
    """SIGKILL every marked process with its process group, until none is left or 2 s have passed.

    By group, because killing a group is atomic: processes that fork cannot outrun it.
    """
    give_up = time.monotonic() + 2.0
    own_group = os.getpgrp()
    while (pids := marked(mark)) and time.monotonic() < give_up:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                group = os.getpgid(pid)
                if group == own_group:
                    os.kill(pid, signal.SIGKILL)
                else:
                    os.killpg(group, signal.SIGKILL)
        time.sleep(0.005)


def main(mark: str) -> None:
    driver = os.getppid()
    while os.getppid() == driver:
        readable, _, _ = select.select([0], [], [], _CHECK_SECONDS)
        if readable:  # nothing is ever written: this is the end of the stream
            break
    kill_marked(mark)


if __name__ == "__main__":
    main(sys.argv[1])
