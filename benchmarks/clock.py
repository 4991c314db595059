"""Wall time, CPU-seconds of the benchmark's own processes, and what others took of the machine meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import psutil

TICKS = os.sysconf("SC_CLK_TCK")
FOREIGN_CORES = 0.1
"""Of other processes; more, and a run does not count."""
FOREIGN_SECONDS = 0.1
"""As much is noise of the kernel's bookkeeping, however short the run."""
STOLEN_SHARE = 0.01
"""Of the machine's time, taken by other machines of the same host."""


@dataclass(frozen=True, slots=True)
class Reading:
    """All in seconds."""

    now: float
    own: float = 0.0
    """CPU time of this process and all its descendants, those that have ended included."""
    busy: float = 0.0
    """CPU time of everybody."""
    stolen: float = 0.0


class Clock(Protocol):
    def now(self) -> float: ...

    def read(self) -> Reading: ...


class MachineClock:
    """The real one."""

    def now(self) -> float:
        return time.perf_counter()

    def read(self) -> Reading:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq, stolen = map(int, file.readline().split()[1:9])
        busy = (user + nice + system + irq + softirq) / TICKS
        return Reading(self.now(), sum(cpu_times()), busy, stolen / TICKS)


def cpu_times() -> Iterator[float]:
    """Of each living process of this tree, with the children that it has outlived."""
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            times = process.cpu_times()
            yield times.user + times.system + times.children_user + times.children_system


def disturbance(before: Reading, after: Reading) -> str:
    """What makes the time between two readings useless; "" where nothing does."""
    seconds = after.now - before.now
    own = after.own - before.own
    foreign = after.busy - before.busy - own
    stolen = after.stolen - before.stolen
    if foreign > max(FOREIGN_CORES * seconds, FOREIGN_SECONDS):
        return f"others used {foreign:.2f} CPU-seconds"
    if stolen > max(STOLEN_SHARE * seconds * (os.cpu_count() or 1), FOREIGN_SECONDS):
        return f"{stolen:.2f} s were stolen by other machines"
    return ""
