"""A private cluster's token, the refusal of an exposed one, and what a job's folder decides."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from plait.engine import guard
from plait.engine.errors import ClusterError
from plait.launch import cluster, job
from plait.launch.config import validate

RECIPE = {
    "run": {"name": "sums"},
    "model": "m/m",
    "algorithm": {"type": "chord"},
    "data": {"type": "jsonl", "path": "rows.jsonl"},
    "reward": "math",
    "loop": {"steps": 1},
}


@pytest.fixture
def token_file(tmp_path, monkeypatch) -> Path:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "ray" / "token"))
    return tmp_path / "ray" / "token"


def test_a_token_is_made_once_for_its_owner_alone(token_file):
    cluster.ensure_token()
    token = token_file.read_text()
    assert len(token) == 64
    assert token_file.stat().st_mode & 0o777 == 0o600
    cluster.ensure_token()
    assert token_file.read_text() == token


def test_an_empty_token_file_gets_a_token(token_file):
    """Left by a process that was killed while it made one: Ray would wait for a token for ever."""
    token_file.parent.mkdir()
    token_file.touch()
    cluster.ensure_token()
    assert len(token_file.read_text()) == 64
    assert token_file.stat().st_mode & 0o777 == 0o600
    assert [*token_file.parent.iterdir()] == [token_file]


def test_one_of_two_runs_makes_the_token(token_file, monkeypatch):
    link = os.link

    def too_late(draft: str, path: Path) -> None:
        path.write_text("of the other run")
        link(draft, path)

    monkeypatch.setattr(os, "link", too_late)
    cluster.ensure_token()
    assert token_file.read_text() == "of the other run"
    assert [*token_file.parent.iterdir()] == [token_file]


def test_an_address_that_a_run_cannot_join_is_named(monkeypatch):
    import ray

    for name in ("PYTHONPATH", "RAY_OVERRIDE_JOB_RUNTIME_ENV"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # given back at the end
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with (
        pytest.raises(ClusterError, match=r"http://head:8265: .*`plait submit`"),
        cluster.ray_cluster(),
    ):
        pass

    def refused(**_: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at head:6379")

    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(ray, "init", refused)
    with pytest.raises(ClusterError, match="head:6379: Failed to connect"), cluster.ray_cluster():
        pass


@pytest.mark.parametrize(
    ("name", "value"), [("RAY_AUTH_TOKEN", "given"), ("RAY_AUTH_MODE", "disabled")]
)
def test_no_token_is_made_where_none_is_wanted(token_file, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    cluster.ensure_token()
    assert not token_file.exists()


@pytest.mark.parametrize(
    ("address", "asks", "insecure", "refused"),
    [
        ("10.0.0.1", False, "0", True),
        ("10.0.0.1", False, "1", False),
        ("10.0.0.1", True, "0", False),
        ("127.0.0.1", False, "0", False),
        ("fd00::2", False, "0", True),
    ],
)
def test_a_cluster_open_to_anybody_is_refused(monkeypatch, address, asks, insecure, refused):
    import ray

    monkeypatch.setenv(cluster.INSECURE, insecure)
    monkeypatch.setattr(cluster, "asks_for_token", lambda dashboard: asks)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "NodeManagerAddress": address}])
    if not refused:
        cluster.refuse_exposed("")
        return
    with pytest.raises(ClusterError, match="asks nobody for a token") as caught:
        cluster.refuse_exposed("")
    assert address in str(caught.value)
    assert "--insecure" in str(caught.value)


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/open" else 401)
        self.end_headers()

    def log_message(self, format: str, *args) -> None:
        pass


def test_whether_a_dashboard_serves_anybody():
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert cluster.answers_anybody(f"{url}/open")
        assert not cluster.answers_anybody(f"{url}/api/jobs/")
        server.shutdown()
    assert not cluster.answers_anybody(f"{url}/open"), "nobody answers any more"


def in_a_job(monkeypatch) -> None:
    config = {"metadata": {"job_submission_id": "raysubmit_1"}}
    monkeypatch.setenv(job.JOB, json.dumps(config))


def test_a_jobs_run_folder_outlives_it(monkeypatch, tmp_path):
    recipe = validate(RECIPE)
    monkeypatch.delenv(job.JOB, raising=False)
    assert job.settle(recipe) == recipe, "no job"
    in_a_job(monkeypatch)
    assert job.job_id() == "raysubmit_1"
    monkeypatch.setenv(job.HOME, str(tmp_path))
    assert job.settle(recipe).folder == tmp_path / "runs" / "sums"
    absolute = validate({**RECIPE, "run": {"name": "sums", "dir": "/shared/runs"}})
    assert job.settle(absolute) == absolute


def test_the_submitted_checkout_takes_over(monkeypatch, tmp_path):
    """Only in a job, and only where another plait runs."""
    began: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, words: began.append(words))
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    main = tmp_path / "src" / "plait" / "launch" / "__main__.py"
    main.parent.mkdir(parents=True)
    main.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(job.JOB, raising=False)
    job.run_submitted_code()
    in_a_job(monkeypatch)
    monkeypatch.chdir(Path(__file__).parents[2])
    job.run_submitted_code()
    assert began == []
    monkeypatch.chdir(tmp_path)
    job.run_submitted_code()
    assert [words[1:3] for words in began] == [["-m", "plait.launch"]]
    assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path / "src")


START = """
import os
from plait.engine import guard
from plait.launch.cluster import ray_cluster
with ray_cluster():
    print(os.environ[guard.RUN], flush=True)
    input()
"""


def test_every_process_of_a_private_cluster_bears_the_guards_mark():
    """Also those that give themselves another title; often, for where they write it is a matter of luck."""
    for _ in range(2):
        driver = subprocess.Popen(
            [sys.executable, "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert driver.stdout is not None
            mark = driver.stdout.readline().strip()
            started = {*below(driver.pid)}
            unmarked = started - {*guard.marked(mark, guard.RUN)}
            commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in unmarked]
            assert len(started) > 5
            assert [b"guard.py" in command for command in commands] == [True], commands
        finally:
            driver.communicate("\n", timeout=60)


def below(parent: int) -> list[int]:
    """All processes that it has started, and those that they have."""
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    children = [int(pid) for file in tasks for pid in file.read_text().split()]
    return [*children, *(pid for child in children for pid in below(child))]
