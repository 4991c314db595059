"""Find and kill what a role's processes leave behind, also after the driver itself was killed.

Every process of the role carries a mark in its environment, which all its descendants inherit: in other process groups
and sessions too. Linux only, as it reads /proc. As a program (`python guard.py VARIABLE MARK [FOLDER]`) this file waits
until its standard input closes or the driver is gone, then kills everything that bears the mark and removes the folder.
It imports only the standard library, so it starts in milliseconds.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time

SCORING = "PLAIT_SCORING_PROCESS"
"""Of scoring processes, which may fork: they are killed by process group, of which each has its own."""
RUN = "PLAIT_RUN_PROCESS"
"""Of a private Ray cluster and all its workers, which share the driver's process group."""
_CHECK_SECONDS = 0.5
_KILL_SECONDS = 2.0


def start(variable: str, mark: str, folder: str = "") -> subprocess.Popen[bytes]:
    """The guard of what bears the mark, as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, variable, mark, folder],
        stdin=subprocess.PIPE,
        start_new_session=True,
        env={key: value for key, value in os.environ.items() if key != variable},
    )


def marked(mark: str, variable: str = SCORING) -> list[int]:
    """Pids of living processes whose mark starts with `mark`."""
    needle = f"\0{variable}={mark}".encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        # A process may end meanwhile (OSError), or belong to someone else (PermissionError).
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if needle in b"\0" + file.read():
                found.append(int(name))
    return found


def is_tracker(pid: int) -> bool:
    """Python's own process that unlinks the shared memory of those that were killed, and ends after them."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return b"multiprocessing.resource_tracker" in file.read()
    return False


def group_size(group: int) -> int:
    """Number of processes in a process group. Reads no files, since those of a forking process block for long."""
    count = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(ValueError, OSError):  # not a process, or one that just ended
            count += os.getpgid(int(name)) == group
    return count


def kill_marked(mark: str, variable: str = SCORING) -> None:
    """SIGKILL every marked process, until none is left or 2 s have passed; a tracker gets half of that to clean up.

    Scoring processes with their process group, because killing a group is atomic: processes that fork cannot outrun it.
    """
    started, own_group = time.monotonic(), os.getpgrp()
    while (pids := marked(mark, variable)) and time.monotonic() < started + _KILL_SECONDS:
        for pid in pids:
            if (
                variable == RUN
                and is_tracker(pid)
                and time.monotonic() < started + _KILL_SECONDS / 2
            ):
                continue
            with contextlib.suppress(ProcessLookupError, PermissionError):
                group = os.getpgid(pid)
                if variable == RUN or group == own_group:
                    os.kill(pid, signal.SIGKILL)
                else:
                    os.killpg(group, signal.SIGKILL)
        time.sleep(0.005)


def main(variable: str, mark: str, folder: str) -> None:
    # `ray job stop` signals all processes below the driver; this one has work when they are gone.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    driver = os.getppid()
    while os.getppid() == driver:
        readable, _, _ = select.select([0], [], [], _CHECK_SECONDS)
        if readable:  # nothing is ever written: this is the end of the stream
            break
    kill_marked(mark, variable)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
