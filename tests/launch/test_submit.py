"""What `plait submit` sends, and what it makes of a job's end; the job server itself is met in tests/faults."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
import requests
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from plait.engine.errors import ClusterError, ConfigError, RunInUse
from plait.launch import submit as jobs
from plait.launch.cli import app
from plait.launch.config import load_recipe, validate

RECIPE = {
    "run": {"name": "sums"},
    "model": "m/m",
    "algorithm": {"type": "chord"},
    "data": {"type": "jsonl", "path": "rows.jsonl"},
    "reward": "math",
    "loop": {"steps": 1},
}


def submission(folder: Path, **values: Any) -> jobs.Submission:
    return jobs.Submission(validate(RECIPE), "a recipe.yaml", ["loop.steps=1"], folder, **values)


def test_the_command_names_the_run_folder_on_every_node(tmp_path):
    command = submission(tmp_path).command("train")
    assert command.startswith("python -m plait.launch train 'a recipe.yaml' loop.steps=1 ")
    assert f'run.dir="{tmp_path / "runs"}"' in shlex.split(command)
    assert submission(tmp_path, insecure=True).command("train").endswith("--insecure")


@pytest.mark.parametrize("name", ["sums", "2026", "on"])
def test_the_jobs_recipe_is_the_one_that_was_submitted(tmp_path, monkeypatch, name):
    """Also where YAML would read the run's name as a number or a truth."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{name}.yaml").write_text(json.dumps({**RECIPE, "run": {}}))
    recipe = load_recipe(f"{name}.yaml")
    command = jobs.Submission(recipe, f"{name}.yaml").command("train")
    overrides = shlex.split(command)[5:]
    assert load_recipe(f"{name}.yaml", overrides).folder == tmp_path / "runs" / name


def test_a_checkout_runs_its_own_code(tmp_path):
    (tmp_path / "src" / "plait" / "launch").mkdir(parents=True)
    assert submission(tmp_path).command("train").startswith("PYTHONPATH=src:$PYTHONPATH python -m")


def test_what_goes_along(tmp_path):
    """The folder without runs; the grace period; nothing of this machine's environment."""
    env = submission(tmp_path, grace_seconds=90).runtime_env()
    assert env["working_dir"] == str(tmp_path)
    assert "/runs" in env["excludes"]
    assert env["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "90"}


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 5, 5),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.STOPPED, None, 3),
    ],
)
def test_exit_codes(status, code, expected):
    info = SimpleNamespace(status=status, driver_exit_code=code, submission_id="j", message="")
    assert jobs.exit_code(info) == expected


def test_a_job_that_never_began_is_the_clusters_failure():
    info = SimpleNamespace(
        status=JobStatus.FAILED, driver_exit_code=None, submission_id="j", message="no node"
    )
    with pytest.raises(ClusterError, match="no node"):
        jobs.exit_code(info)


class Server:
    """Jobs as the server lists them."""

    def __init__(self, *listed: tuple[str, Path, JobStatus, int]) -> None:
        self.listed = [
            SimpleNamespace(
                submission_id=name,
                status=status,
                start_time=start,
                metadata={jobs.RUN: folder.name, jobs.FOLDER: str(folder)},
            )
            for name, folder, status, start in listed
        ]
        self.listed.append(SimpleNamespace(submission_id="other", metadata={}, start_time=9))

    def list_jobs(self) -> list[Any]:
        return self.listed


class Gone:
    """A server whose head has died: what requests, aiohttp and Ray raise then."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def list_jobs(self) -> list[Any]:
        raise self.error

    async def tail_job_logs(self, job: str) -> Any:
        yield "step 1\n"
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        requests.exceptions.ConnectionError("Connection refused"),
        aiohttp.ServerDisconnectedError(),
        RuntimeError("WebSocket connection closed unexpectedly with close code 1006"),
    ],
)
def test_a_lost_server_is_the_clusters_failure(tmp_path, error, capsys):
    with pytest.raises(ClusterError, match=r"followed.*`plait status`"):
        jobs.follow(cast(Any, Gone(error)), "j")
    assert "step 1" in capsys.readouterr().out
    with pytest.raises(ClusterError, match="does not list"):
        jobs.refuse_second(cast(Any, Gone(error)), tmp_path)


def test_status_of_a_job_whose_run_is_not_there_yet(tmp_path, monkeypatch):
    server = Server(("new", tmp_path / "sums", JobStatus.PENDING, 0))
    server.listed[0].start_time = None
    monkeypatch.setattr(jobs, "connect", lambda address: server)
    said = CliRunner().invoke(app, ["status", "sums"]).output
    assert said.startswith("new  PENDING  not begun  ")
    assert "holds no run yet" in said
    found = json.loads(CliRunner().invoke(app, ["status", "sums", "--json"]).output)
    one = {"job": "new", "status": "PENDING", "folder": str(tmp_path / "sums")}
    assert found == {"job": one}
    assert json.loads(CliRunner().invoke(app, ["status", "--json"]).output) == [one]


def test_jobs_are_found_by_name_folder_and_id(tmp_path):
    old = ("old", tmp_path / "sums", JobStatus.FAILED, 1)
    new = ("new", tmp_path / "sums", JobStatus.RUNNING, 2)
    server = cast(Any, Server(old, new))
    for target in ("sums", str(tmp_path / "sums"), "new"):
        assert jobs.find_job(server, target).submission_id == "new"
    assert jobs.find_job(server, "old").submission_id == "old"
    with pytest.raises(
        ConfigError, match="no such job or run on this cluster; jobs there: new, old"
    ):
        jobs.find_job(server, "other")


def test_a_second_job_of_a_run_is_refused(tmp_path):
    ended = ("first", tmp_path / "sums", JobStatus.STOPPED, 1)
    jobs.refuse_second(cast(Any, Server(ended)), tmp_path / "sums")
    going = ("second", tmp_path / "sums", JobStatus.RUNNING, 2)
    with pytest.raises(RunInUse, match="second"):
        jobs.refuse_second(cast(Any, Server(ended, going)), tmp_path / "sums")


def test_no_server(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(jobs.SERVER, "http://127.0.0.1:7")
    for address in (None, "http://127.0.0.1:9"):  # given by hand: before the environment
        place = address or "http://127.0.0.1:7"
        with pytest.raises(ClusterError, match=f"no Ray job server at {place}: .*{place}"):
            jobs.connect(address)
