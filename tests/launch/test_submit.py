"""What `plait submit` sends, and what it makes of a job's end; the job server itself is met in tests/faults."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.job_submission import JobStatus

from plait.engine.errors import ClusterError, ConfigError, RunInUse
from plait.launch import submit as jobs
from plait.launch.config import validate

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
    assert f"run.dir={tmp_path / 'runs'} run.name=sums" in command
    assert submission(tmp_path, insecure=True).command("train").endswith("--insecure")


def test_a_checkout_runs_its_own_code(tmp_path):
    (tmp_path / "src" / "plait" / "launch").mkdir(parents=True)
    assert submission(tmp_path).command("train").startswith("PYTHONPATH=src:$PYTHONPATH python -m")


def test_what_goes_along(tmp_path):
    """The folder without runs; the grace period; nothing of this machine's environment."""
    env = submission(tmp_path, grace_seconds=90).runtime_env()
    assert env["working_dir"] == str(tmp_path)
    assert "runs" in env["excludes"]
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
    with pytest.raises(ClusterError, match=r"no Ray job server at http://127\.0\.0\.1:9"):
        jobs.connect("http://127.0.0.1:9")
