"""Processes of a run, which end with it: found by their parents, killed with their children, on whatever node they are.

A stopped (SIGSTOP) process neither notices that its parent died nor obeys a request to end, so nothing here asks.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .guard import is_tracker

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process of the run lives: Ray's id of the node, and its pid there."""

    node: str
    pid: int

    @classmethod
    def here(cls) -> Place:
        """Of this Ray worker (or driver)."""
        import ray

        return cls(ray.get_runtime_context().get_node_id(), os.getpid())


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends (PR_SET_PDEATHSIG); Linux only.

    Strictly, when the parent's *thread* ends that started it: for processes whose parent starts them on its main
    thread.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Pids of the living children of a process, of all its threads."""
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the process, or the thread, has ended meanwhile
            found += map(int, listing.read_text().split())
    return found


def family(pid: int) -> list[int]:
    """The process and all its descendants, parents first."""
    found = [pid]
    for one in found:
        found += children(one)
    return found


def kill_family(pid: int) -> None:
    """SIGKILL a process and its descendants; what is gone already is no error.

    Trackers of shared memory are left to end by themselves: they clean up after the others.
    """
    members = family(pid)
    for one in members:
        if is_tracker(one):
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """False for a process that ended, also while nobody has asked for its exit status."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def all_gone(pids: Sequence[int], seconds: float) -> bool:
    """Wait until none of the processes is left; False when one is after `seconds`."""
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def how_it_died(error: Exception) -> str:
    """What Ray knows of the end of an actor, without its list of possible causes."""
    last = str(error).strip().splitlines()[-1].strip()
    return last.partition(" Some common causes")[0].rpartition("Worker exit detail: ")[2]


def kill_actor(actor: Any, place: Place | None) -> None:
    """End a Ray actor for good, stopped or not, with the processes it started; returns without waiting.

    `place` is None where the actor has not told it yet: then Ray alone ends it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if place is not None:
        if place.node == ray.get_runtime_context().get_node_id():
            kill_family(place.pid)
        else:
            there = NodeAffinitySchedulingStrategy(place.node, soft=False)
            on_node = ray.remote(kill_family).options(num_cpus=0, scheduling_strategy=there)
            on_node.remote(place.pid)  # fails where the node is gone, and the process with it
    ray.kill(actor)
