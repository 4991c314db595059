"""status.json, and the one line about a run in which nothing moves."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from typing import Any, cast

import pytest

from plait.engine.metrics import RunLog
from plait.engine.processes import all_gone, family, is_alive, kill_family
from plait.engine.ray_ranks import Activity, RayRanks
from plait.engine.status import StatusFile, waits_for

SERVES = {"name": "rollout-0", "state": "serves", "seconds": 9.0}
OWES = {**SERVES, "owes": 2, "oldest": "prompt p/3 (index 1)", "oldest_seconds": 7.0}
LATE = {"name": "rollout-1", "state": "is starting", "seconds": 8.0, "owes": 0}
BUSY = {"method": "step", "in_collective": True, "seconds": 5.0, "where": "in all_reduce"}
SLOW = {**BUSY, "in_collective": False, "where": "at engine/learner.py:9 (step)"}


class Role:
    def __init__(self, *rows: dict[str, Any]) -> None:
        self.rows = rows

    def status(self) -> tuple[dict[str, Any], ...]:
        return self.rows


class Quiet:
    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


class Listener(Quiet):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.mark.parametrize(
    ("phase", "workers", "ranks", "expected"),
    [
        ("rollout", [OWES, LATE], [], "prompt p/3 (index 1) at rollout-0 for 7 s"),
        ("rollout", [LATE], [], "rollout-1, which is starting for 8 s"),
        ("eval", [SERVES], [], "the scorer"),
        (
            "update",
            [SERVES],
            [{"rank": 0, **BUSY}, {"rank": 1, **SLOW}],
            "learner rank 1: step for 5 s, at engine/learner.py:9 (step)",
        ),
        ("checkpoint", [], [{"rank": 0, "method": ""}], "this process (checkpoint)"),
    ],
)
def test_what_a_phase_waits_for(phase, workers, ranks, expected) -> None:
    assert waits_for(phase, workers, ranks) == expected


def test_a_rank_may_fall_silent_while_its_status_is_read() -> None:
    """The thread that calls the ranks forgets what they did as soon as they are done."""

    class Rank:
        heard = 0.0

        def __init__(self) -> None:
            self.said = [Activity("step", 1.0, "here", False, 3), None]

        @property
        def activity(self) -> Activity | None:
            return self.said.pop(0)

    ranks = RayRanks.__new__(RayRanks)
    ranks._ranks = cast(Any, [Rank()])
    (row,) = ranks.status()
    assert row["method"] == "step"


def test_a_full_disk_is_told_once(tmp_path) -> None:
    console = Listener()
    log = RunLog(tmp_path, cast(Any, console))
    (tmp_path / ".status.json.partial").mkdir()
    status = StatusFile(log, Role(), Role(), 60.0)
    for _ in range(3):
        status._write({})
    status.close()
    assert len(console.said) == 1
    assert "status.json is out of date" in console.said[0]


def test_a_rank_that_dies_unasked_is_told_once(tmp_path) -> None:
    console = Listener()
    dead = {"rank": 1, "method": "", "lost": "killed"}
    status = StatusFile(RunLog(tmp_path, cast(Any, console)), Role(), Role(dead), 60.0)
    time.sleep(2.5)
    status.close()
    assert console.said == ["learner rank 1 died: killed; all ranks start again at their next call"]


def test_a_run_that_is_stuck_says_so_once_and_one_that_moves_does_not(tmp_path) -> None:
    log, told, stuck = RunLog(tmp_path, cast(Any, Quiet())), [], threading.Event()

    def stalled(message: str) -> None:
        told.append(message)
        stuck.set()

    worker = dict(OWES)
    with log.phase("rollout"):
        status = StatusFile(log, Role(worker), Role(), 2.5, stalled)
        for seconds in range(4):  # one sample less each second; and times, which do not count
            worker |= {"owes": 9 - seconds, "oldest_seconds": 7.0 + seconds}
            time.sleep(1)
        assert not told
        assert stuck.wait(10)
        content = json.loads((tmp_path / "status.json").read_text())
        status.close()
    assert content["phase"] == "rollout"
    assert content["rollout_workers"][0]["owes"] == 6
    (message,) = told
    assert message.startswith("nothing moved for loop.stall_seconds = 2.5: step 0, rollout, waits ")
    assert message.endswith("for prompt p/3 (index 1) at rollout-0 for 10 s")
    assert json.loads((tmp_path / "status.json").read_text())["phase"] == "ended"


def test_a_family_is_killed_when_it_is_stopped_too() -> None:
    code = (
        "import subprocess, os, signal; p = subprocess.Popen(['sleep', '60']); "
        "os.kill(p.pid, signal.SIGSTOP); p.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 10
    while len(family(parent.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    everyone = family(parent.pid)
    assert len(everyone) == 2
    kill_family(parent.pid)
    parent.wait()
    assert all_gone(everyone, 5)
    assert not any(map(is_alive, everyone))
