"""A submitted run goes on while nodes of its cluster come and go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from job_folder import make_job_folder
from ray_head import ROOT, user_environ

STEPS = 45


@pytest.mark.long
def test_f6_f7_nodes_come_and_go(tmp_path, tiny_model, measured):
    """Real vLLM and DeepSpeed; two rollout workers, the learner's node lost as well."""
    folder = make_job_folder(
        tmp_path / "nodes",
        tiny_model,
        steps=STEPS,
        reward_seconds=0.6,
        checkpoint={"every": 2},
        rollouts={"num_workers": 2, "resources": {"roll": 1}},
        learner={"resources": {"learn": 1}},
    )
    path = os.pathsep.join(str(ROOT / part) for part in ("src", "tests", "tests/faults"))
    environ = {**user_environ(), "PYTHONPATH": path, "RAY_AUTH_MODE": "disabled"}
    script = Path(__file__).with_name("three_nodes.py")
    done = subprocess.run(
        [sys.executable, script, folder], env=environ, capture_output=True, text=True, timeout=560
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["status"] == "SUCCEEDED", found["log"]
    assert found["steps"] == list(range(1, STEPS + 1)), "each step once"
    print({name: value for name, value in found.items() if name not in ("log", "steps")})
    share = found["step_with_two"] / found["step_with_one"]
    assert share / (1 / 2) >= 0.9
    assert found["without_learner_node"] <= 60
    measured(
        "F6",
        f"real run: speed with one of two rollout nodes {share:.2f} of that with both, next step "
        f"{found['without_rollout_node']:.1f} s after the loss; back after {found['rejoined']:.0f} s",
    )
    measured(
        "F7",
        f"real run: next new step {found['without_learner_node']:.1f} s after the loss of the learner's node; "
        f"effective training time {found['effective']:.2f}",
    )
