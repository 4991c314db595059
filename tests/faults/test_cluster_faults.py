"""Nodes that are lost, and a small object store: each in a program of its own, which starts its own Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_store import BATCH, STORE
from stub_workers import CONFIG

pytestmark = pytest.mark.long
HERE = Path(__file__).parent


def report(program: str, folder: Path, seconds: float) -> dict[str, Any]:
    """What it writes; Ray's own lines go to its output."""
    found = folder / "found.json"
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "src")]
    done = subprocess.run(
        [sys.executable, str(HERE / program), str(found)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(found.read_text())


def test_f6_f7_nodes_leave_and_come_back(tmp_path, measured) -> None:
    found = report("lose_nodes.py", tmp_path, 200)
    rollout, learner = found["rollout"], found["learner"]
    goodput = rollout["during"] / (rollout["before"] / 2)
    assert goodput >= 0.9
    assert rollout["after"] >= 1.5 * rollout["during"]
    measured(
        "F6",
        f"goodput {goodput:.2f} of (n-1)/n once the loss was known, after {rollout['detected']:.1f} s; "
        f"lost samples 0, back {rollout['back']:.1f} s after its node",
    )
    assert learner["elsewhere"]
    assert "learner rank 0" in learner["lost"]
    assert "found no place in the cluster within learner.place_seconds = 8" in learner["reason"]
    assert max(learner["moved"], learner["decided"]) <= 60
    measured(
        "F7",
        f"on another node after {learner['moved']:.1f} s; without one, an end with the reason after "
        f"{learner['decided']:.1f} s",
    )


def test_f34_a_slow_consumer_holds_the_producers_back(tmp_path, measured) -> None:
    found = report("small_store.py", tmp_path, 120)
    bound = CONFIG.num_workers * 2 * CONFIG.max_num_seqs
    assert found["taken"] == 160
    assert found["most"] <= bound
    assert found["spilled"] == 0
    assert found["peak"] <= STORE
    measured(
        "F34",
        f"samples waiting <= {found['most']} (bound {bound}); {80 * BATCH.nbytes / 2**20:.0f} MiB of batches: peak "
        f"{found['peak'] / 2**20:.0f} of {STORE / 2**20:.0f} MiB, spilled 0",
    )
