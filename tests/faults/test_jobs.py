"""Runs as jobs of a real Ray cluster with its job server: as users submit them, stopped, killed, submitted again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from intruder import accepted_calls, listeners_of
from job_folder import (
    SUBMIT,
    details,
    ended,
    log_of,
    make_job_folder,
    start,
    trained_steps,
    wait_for,
)
from ray_head import ROOT, RayHead, processes_below, ray_head

from plait.engine.errors import RunInUse

TRAIN = ("plait", "train", "recipe.yaml")
CANARIES = {
    name: f"canary-{name.lower()}-5d1f"
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "MY_JUDGE_KEY")
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def head(home):
    with ray_head({"PLAIT_HOME": str(home), **CANARIES}) as head:
        yield head


def test_a_job_from_a_users_folder(head: RayHead, home, tmp_path, tiny_model, measured):
    """`ray job submit --working-dir . -- plait train recipe.yaml`, and what strangers can do meanwhile (F31, F32)."""
    folder = make_job_folder(tmp_path / "mine", tiny_model, steps=3)
    run = home / "runs" / "recipe"
    job = start(head, folder, *TRAIN)
    wait_for(lambda: trained_steps(run), 200, lambda: log_of(head, job))
    commands = [*command_lines(), json.dumps(head.get("/api/jobs/"))]

    pids = processes_below(head.process.pid)
    listeners = listeners_of(pids)
    elsewhere = [one for one in listeners if one.address not in ("127.0.0.1", "::1")]
    assert elsewhere == []
    tried, accepted = 0, []
    for one in listeners:
        for token in (None, "0" * 64):
            n, served = accepted_calls(one.port, token)
            tried += n
            accepted += [(one.process, what, token) for what in served]
    assert accepted == []
    assert head.get("/api/jobs/"), "its owner is served"

    status, code, log = ended(head, job)
    assert (status, code) == ("SUCCEEDED", 0), log
    assert trained_steps(run) == [1, 2, 3]
    assert f"run folder {run}" in log
    assert not (folder / "runs").exists()
    measured("F31", f"accepted 0/{tried} at {len(listeners)} ports, listeners elsewhere 0")

    secrets = [*CANARIES.values(), head.token]
    places = {path: path.read_bytes() for path in files_of(run, head.folder / "ray")}
    hits = [str(path) for path, text in places.items() for s in secrets if s.encode() in text]
    hits += [command for command in commands for s in secrets if s in command]
    assert hits == []
    measured(
        "F32", f"hits 0 in {len(places)} files, {len(commands)} command lines and the job list"
    )


def command_lines() -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def files_of(*folders: Path) -> list[Path]:
    """Regular files, so neither sockets nor pipes."""
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


@pytest.mark.long
def test_f5_f19_started_twice_stopped_killed_submitted_again(
    head: RayHead, home, tmp_path, tiny_model, measured
):
    """One run folder through four jobs, each step trained once, and the bits of a run that nobody disturbed."""
    whole = ("plait", "train", "recipe.yaml", "run.deterministic=true", "checkpoint.every=2")
    folder = make_job_folder(tmp_path / "again", tiny_model, steps=6, reward_seconds=0.6)
    runs = home / "runs"
    status, code, log = ended(head, start(head, folder, *whole, "run.name=calm"))
    assert (status, code) == ("SUCCEEDED", 0), log

    disturbed = (*whole, "run.name=disturbed")
    run = runs / "disturbed"
    first = start(head, folder, *disturbed)
    wait_for((run / "config.yaml").exists, 60, lambda: log_of(head, first))
    status, code, log = ended(head, start(head, folder, *disturbed))
    assert (status, code) == ("FAILED", RunInUse.exit_code), log
    wait_for(lambda: trained_steps(run), 200, lambda: log_of(head, first))
    asked = time.monotonic()
    assert head.run("ray", "job", "stop", first, cwd=folder).returncode == 0
    assert ended(head, first)[0] == "STOPPED"
    took = time.monotonic() - asked
    checkpointed = max(int(path.name[-6:]) for path in (run / "checkpoints").glob("step-*"))
    assert checkpointed == len(trained_steps(run)) > 0
    measured("F19", f"`ray job stop`: checkpoint and end in {took:.1f} s, steps lost 0")

    steps = len(trained_steps(run))
    third = start(head, folder, *disturbed)
    wait_for(lambda: len(trained_steps(run)) > steps, 200, lambda: log_of(head, third))
    driver = int(details(head, third)["driver_info"]["pid"])
    below = processes_below(driver)
    os.kill(driver, signal.SIGKILL)
    killed = time.monotonic()
    assert ended(head, third)[0] == "FAILED"
    wait_for(lambda: not any(map(psutil.pid_exists, below)), 10)
    wait_for(lambda: not workers_of(head), 10)

    last = start(head, folder, *disturbed)
    wait_for(lambda: "resuming after" in str(head.get(f"/api/jobs/{last}/logs")), 100)
    status, code, log = ended(head, last)
    assert (status, code) == ("SUCCEEDED", 0), log
    assert trained_steps(run) == [1, 2, 3, 4, 5, 6], "each step once"
    names = sorted(path.name for path in runs.iterdir() if path.name.startswith(("calm", "dist")))
    assert names == ["calm", "disturbed"], "one run folder"
    calm, again = ((runs / name / "export" / "model.safetensors") for name in names)
    assert calm.read_bytes() == again.read_bytes()
    seconds = time.monotonic() - killed
    measured("F5", f"bits equal, orphans 0, resumed and ended {seconds:.0f} s after the kill")


def workers_of(head: RayHead) -> list[str]:
    """Learner ranks and rollout workers that are still there."""
    names = []
    for pid in processes_below(head.process.pid):
        try:
            names.append(" ".join(psutil.Process(pid).cmdline()))
        except psutil.Error:
            continue
    return [name for name in names if name.startswith(("ray::Rem", "ray::Roll"))]


@pytest.mark.long
def test_f8_a_new_head_goes_on_where_the_old_one_died(home, tmp_path, tiny_model, measured):
    folder = make_job_folder(
        tmp_path / "heads", tiny_model, steps=5, reward_seconds=0.5, checkpoint={"every": 2}
    )
    command = (*TRAIN, "run.name=heads")
    run = home / "runs" / "heads"
    with ray_head({"PLAIT_HOME": str(home)}) as old:
        job = start(old, folder, *command)
        latest = run / "checkpoints" / "latest"
        wait_for(latest.exists, 200, lambda: log_of(old, job))
        old.kill()
    before = trained_steps(run)
    died = time.monotonic()
    with ray_head({"PLAIT_HOME": str(home)}) as new:
        job = start(new, folder, *command)
        wait_for(lambda: len(trained_steps(run)) > len(before), 200)
        recovered = time.monotonic() - died
        status, code, log = ended(new, job)
    assert (status, code) == ("SUCCEEDED", 0), log
    assert trained_steps(run) == [1, 2, 3, 4, 5]
    measured("F8", f"new head, first new step after {recovered:.0f} s, steps lost 0")


@pytest.mark.long
def test_a_checkout_of_plait_runs_the_submitted_code(head: RayHead, home, tmp_path, tiny_model):
    """The driver's code and the workers': both are changed in the checkout, whose links are files in the copy."""
    checkout = tmp_path / "checkout"
    names = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT
    )
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).exists() and not name.startswith("tests/"):
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, checkout / name, follow_symlinks=False)
    change(checkout / "launch" / "run_folder.py", '"summary.json"', '"summary-of-checkout.json"')
    change(checkout / "rollouts" / "worker.py", "text=self._tok", 'text="checkout " + self._tok')
    folder = make_job_folder(tmp_path / "rows", tiny_model, steps=1)
    for name in ("data.jsonl", "my_rewards.py", "recipe.yaml"):
        shutil.copy(folder / name, checkout / name)
    done = head.run(*SUBMIT, "--", *TRAIN, "run.name=checkout", cwd=checkout)
    assert done.returncode == 0, done.stdout
    run = home / "runs" / "checkout"
    assert (run / "summary-of-checkout.json").is_file()
    assert '"text": "checkout ' in (run / "rollouts" / "step-000001.jsonl").read_text()


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) >= 1
    file.write_text(text.replace(old, new))


@pytest.mark.long
def test_plait_submit(head: RayHead, tmp_path, tiny_model):
    """Preflight table, the run's output and exit code; status and stop; a second submission goes on."""
    folder = make_job_folder(tmp_path / "sub", tiny_model, steps=2)
    done = head.run("plait", "submit", "recipe.yaml", cwd=folder)
    assert done.returncode == 0, done.stdout
    for name in ("versions", "imports", "folder", "model", "ports", "resources", "reward"):
        assert any(
            line.startswith(f"{name} ") and " ok " in line for line in done.stdout.splitlines()
        )
    run = folder / "runs" / "recipe"
    assert trained_steps(run) == [1, 2]
    assert not list(run.glob(".preflight*"))
    status = head.run("plait", "status", "recipe", cwd=folder)
    assert "ended by loop.steps after 2 steps" in status.stdout

    refused = head.run("plait", "submit", "recipe.yaml", "reward=my_rewards:nothing", cwd=folder)
    assert refused.returncode == 2, refused.stdout
    assert "nothing was started" in refused.stdout

    long = ("plait", "submit", "recipe.yaml", "run.name=long", "loop.steps=500")
    assert head.run(*long, "--no-preflight", "--no-follow", cwd=folder).returncode == 0
    long_run = folder / "runs" / "long"
    wait_for(lambda: trained_steps(long_run), 200)
    second = head.run(*long, "--no-preflight", cwd=folder)
    assert second.returncode == RunInUse.exit_code, second.stdout
    stopped = head.run("plait", "stop", "runs/long", cwd=folder)
    assert "STOPPED" in stopped.stdout, stopped.stdout
    assert list((long_run / "checkpoints").glob("step-*"))
