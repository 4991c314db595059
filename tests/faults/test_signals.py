"""F19: who asks a run to stop gets a checkpoint and an exit code of its own, whatever the run is doing."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from end_to_end.command_line import (
    plait_command,
    processes_naming,
    read_lines,
    tiny_recipe,
    write_recipe,
)
from plait.engine.errors import Stopped
from plait.engine.failpoints import VARIABLE
from plait.engine.stop import StopAsked, StopRequest
from plait.launch.signals import ENDED_AT_ONCE, stopped_by_signals

STEPS = 3


def test_a_wait_is_broken_off_and_a_write_is_not():
    stop = StopRequest()
    with pytest.raises(StopAsked, match="SIGTERM"), stop.breakable():
        stop.ask("SIGTERM")
    assert stop.reason == "SIGTERM"
    with pytest.raises(StopAsked), stop.breakable():
        pytest.fail("a wait began after the run was asked to stop")
    stop = StopRequest()
    stop.ask("SIGINT")
    assert stop.reason == "SIGINT"


def test_a_keyboard_interrupt_that_nobody_asked_for_stays_one():
    with pytest.raises(KeyboardInterrupt), StopRequest().breakable():
        raise KeyboardInterrupt


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with stopped_by_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_in_a_notebook_is_asked_too(monkeypatch):
    """Whose sys.stderr is no file."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with stopped_by_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    sums = [(f"{i} + {i}?", str(2 * i)) for i in range(24)]
    rows = [{"id": q, "prompt": q, "answer": a, "demonstration": a} for q, a in sums]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny_recipe(
        tiny_model,
        loop={"steps": STEPS, "prompts_per_step": 2},
        eval={"num_prompts": 0},
        reward={"function": "exact", "gold_samples": 0},
    )
    write_recipe(folder, "recipe.yaml", recipe)
    return folder


def run(folder: Path, name: str, failpoint: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        plait_command("train", "recipe.yaml", f"run.name={name}", "--continue"),
        cwd=folder,
        env={**os.environ, VARIABLE: failpoint, "PLAIT_TEST_MARK": name},
        capture_output=True,
        text=True,
        timeout=200,
    )


def steps_of(folder: Path, name: str) -> list[int]:
    rows = read_lines(folder / "runs" / name / "metrics.jsonl")
    return [row["step"] for row in rows if "reward/mean" in row]


@pytest.mark.long
def test_f19_sigterm_and_ctrl_c_leave_a_checkpoint_and_lose_no_step(folder, measured):
    """In the middle of sampling (six samples a step: the second step), then while it updates (in that step again); each
    time the same command goes on."""
    name = "asked"
    saved = folder / "runs" / name / "checkpoints"

    sampling = run(folder, name, "term:rollout.received:8")
    assert sampling.returncode == Stopped.exit_code == 3, sampling.stdout + sampling.stderr
    assert "SIGTERM after 1 steps" in sampling.stderr
    assert "Traceback" not in sampling.stderr
    assert [path.name for path in saved.glob("step-*")] == ["step-000001"]

    updating = run(folder, name, "interrupt:step.journaled")
    assert updating.returncode == Stopped.exit_code, updating.stdout + updating.stderr
    assert "SIGINT after 2 steps" in updating.stderr
    assert (saved / "step-000002").is_dir()

    finished = run(folder, name, "none:none")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert steps_of(folder, name) == [1, 2, 3], "each step once"
    measured("F19", "SIGTERM while sampling, Ctrl-C while updating: exit code 3, steps lost 0 of 3")


def test_f19_a_second_ctrl_c_ends_at_once(folder, measured):
    """A run whose update never ends would not reach its checkpoint."""
    name = "twice"
    process = subprocess.Popen(
        plait_command("train", "recipe.yaml", f"run.name={name}"),
        cwd=folder,
        env={**os.environ, "PLAIT_TEST_MARK": name},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        journal = folder / "runs" / name / "journal" / "step-000001.json"
        wait_for(journal.exists, 120)
        started = time.monotonic()
        # As a terminal does it: to the whole group. The first one is in an update or a wait, the second follows.
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=10)
    finally:
        process.kill()
    took = time.monotonic() - started
    assert process.returncode in (ENDED_AT_ONCE, Stopped.exit_code)
    wait_for(lambda: not processes_naming(f"PLAIT_TEST_MARK={name}"), 30)
    finished = run(folder, name, "none:none")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert steps_of(folder, name) == [1, 2, 3], "each step once"
    measured("F19", f"twice Ctrl-C: ended after {took:.1f} s, steps lost 0 of 3")


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
