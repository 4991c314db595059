"""`plait status RUN` of what a driver writes."""

from __future__ import annotations

import json
import os
import time

import pytest

from plait.engine.errors import ConfigError
from plait.launch.run_status import describe_run, read_status

STATUS = {
    "phase": "rollout",
    "step": 3,
    "phase_seconds": 12.5,
    "samples": [3, 8],
    "waits_for": "prompt sums/7 (index 2) at rollout-1 for 9 s",
    "rollout_workers": [{"name": "rollout-1", "state": "serves", "seconds": 40.0}],
    "learner_ranks": [{"rank": 0, "method": "", "seconds": 12.0}],
}


def test_a_run_that_goes_on(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "status.json").write_text(json.dumps(STATUS))
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 3, "reward/mean": 0.5}\n{"st')
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    text = "\n".join(describe_run(tmp_path, read_status(tmp_path)))
    assert "3 steps done; rollout for 12.5 s, waits for prompt sums/7 (index 2)" in text
    assert "name rollout-1, state serves" in text
    assert "step 3, reward/mean 0.5" in text
    assert "checkpoints: step-000002" in text
    assert "silent" not in text


def test_a_run_whose_process_is_silent(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    file = tmp_path / "status.json"
    file.write_text(json.dumps(STATUS))
    os.utime(file, (time.time() - 60, time.time() - 60))
    assert "silent for 60 s" in "\n".join(describe_run(tmp_path, read_status(tmp_path)))
    file.write_text(json.dumps({"phase": "ended", "step": 9}))
    assert "has ended, after 9 steps" in "\n".join(describe_run(tmp_path, read_status(tmp_path)))


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ConfigError, match="no run there"):
        read_status(tmp_path)
