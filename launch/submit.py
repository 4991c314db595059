"""`plait submit | status | stop`: a run as a job of a Ray cluster, through the cluster's job server.

Submitting is two jobs: `plait preflight`, whose refusal ends it, then `plait train`. Both get a copy of the folder that
holds recipe, reward and data. What is secret never goes with them: a job's environment is shown in the job list.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.errors import ClusterError, ConfigError, PlaitError, RunInUse, Stopped
from .config import Recipe

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

RUN, FOLDER = "plait_run", "plait_folder"
"""Keys of a job's metadata."""
SERVER = "RAY_API_SERVER_ADDRESS"
"""Ray's environment variable for the address of a job server."""
LEFT_OUT = [".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", "build", "dist"]
"""Of the folder that is copied; what its .gitignore names stays behind, too."""
END_SECONDS = 60.0
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Submission:
    """One recipe for one cluster."""

    recipe: Recipe
    source: str
    """The recipe as the job's command names it: a file below the folder, or the name of a shipped recipe."""
    overrides: Sequence[str] = ()
    working_dir: Path = Path()
    grace_seconds: int = 60
    insecure: bool = False

    @property
    def folder(self) -> Path:
        """The run folder, the same path on every node; relative to the folder that is submitted from."""
        return (self.working_dir / self.recipe.folder).resolve()

    def command(self, name: str) -> str:
        """`plait NAME` of the submitted code where the folder is a checkout of plait, else of the installed one."""
        # As JSON, which is YAML: a run may be named 2026 or on.
        place = {"run.dir": str(self.folder.parent), "run.name": self.folder.name}
        named = [f"{field}={json.dumps(value)}" for field, value in place.items()]
        words = ["python", "-m", "plait.launch", name, self.source, *self.overrides, *named]
        words += ["--insecure"] * self.insecure
        checkout = (self.working_dir / "src" / "plait" / "launch").is_dir()
        return ("PYTHONPATH=src:$PYTHONPATH " if checkout else "") + shlex.join(words)

    def runtime_env(self) -> dict[str, Any]:
        own = self.folder.parent
        inside = own.is_relative_to(self.working_dir.resolve())
        runs = [f"/{own.relative_to(self.working_dir.resolve())}"] if inside else []
        return {
            "working_dir": str(self.working_dir),
            "excludes": [*LEFT_OUT, *runs],
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(self.grace_seconds)},
        }


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Raises ClusterError where the job server refuses, or is gone."""
    from aiohttp import ClientError

    try:
        yield
    except PlaitError:
        raise
    except (ClientError, OSError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"{what}: {first_line(error)}; a job that was started may go on: see `plait status`"
        ) from error


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def connect(address: str | None) -> JobSubmissionClient:
    """The job server at `address`, else at RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else on this machine.

    Raises ClusterError.
    """
    from ray.job_submission import JobSubmissionClient

    if address is not None:
        os.environ[SERVER] = address  # Ray prefers its variables to what it is given
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        known = os.environ.get(SERVER) or os.environ.get("RAY_ADDRESS")
        place = known or "http://127.0.0.1:8265"
        raise ClusterError(
            f"no Ray job server at {place}: {first_line(error)}; "
            "start one with `ray start --head`, or name it with --address"
        ) from error


def refuse_second(client: JobSubmissionClient, folder: Path) -> None:
    """RunInUse where another job of this run goes on."""
    for job in jobs_of(client, folder):
        if not job.status.is_terminal():
            raise RunInUse(
                f"job {job.submission_id} trains in {folder}; follow it with `plait status {job.submission_id}`, "
                f"or end it with `plait stop {job.submission_id}`"
            )


@asking("the job server does not take the job")
def start(client: JobSubmissionClient, what: Submission, command: str) -> str:
    """Submit `plait COMMAND` and return the job's id; only training jobs are listed as runs."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")[:-3]
    purpose = "" if command == "train" else f"{command}-"
    metadata = {RUN: what.recipe.run.name, FOLDER: str(what.folder)} if command == "train" else {}
    return client.submit_job(
        entrypoint=what.command(command),
        submission_id=f"{what.recipe.run.name}-{purpose}{stamp}",
        runtime_env=what.runtime_env(),
        metadata=metadata,
    )


@asking("the job server does not list its jobs")
def jobs_of(client: JobSubmissionClient, folder: Path | None = None) -> list[Any]:
    """Training jobs, the newest first; those of one run folder where one is given."""
    jobs = [job for job in client.list_jobs() if FOLDER in (job.metadata or {})]
    if folder is not None:
        jobs = [job for job in jobs if (job.metadata or {})[FOLDER] == str(folder)]
    return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)


@asking("the job cannot be followed any more")
def follow(client: JobSubmissionClient, job: str) -> int:
    """Print what the job prints until it ends; its exit code. Leaving by Ctrl-C leaves the job running."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    asyncio.run(tail())
    return exit_code(wait_ended(client, job, END_SECONDS))


def wait_ended(client: JobSubmissionClient, job: str, seconds: float) -> Any:
    """The job's details once it has ended. Raises ClusterError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (info := client.get_job_info(job)).status.is_terminal():
        if time.monotonic() > deadline:
            raise ClusterError(f"job {job} is still {info.status.value} after {seconds:.0f} s")
        time.sleep(POLL_SECONDS)
    return info


def exit_code(info: Any) -> int:
    """Of the run's command; one that was stopped says so, one that never began is the cluster's failure."""
    from ray.job_submission import JobStatus

    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return Stopped.exit_code
    if info.driver_exit_code is None:
        raise ClusterError(
            f"job {info.submission_id} failed before its command ran: {info.message}"
        )
    return info.driver_exit_code if info.driver_exit_code >= 0 else 128 - info.driver_exit_code


@asking("the job cannot be stopped")
def stop(client: JobSubmissionClient, target: str) -> tuple[str, str]:
    """Ask a job, or the job that trains in a run folder, to write a checkpoint and end; its id and last status."""
    job = find_job(client, target)
    grace = (job.runtime_env or {}).get("env_vars", {}).get("RAY_JOB_STOP_WAIT_TIME_S", "3")
    client.stop_job(job.submission_id)
    return job.submission_id, wait_ended(
        client, job.submission_id, int(grace) + END_SECONDS
    ).status.value


def find_job(client: JobSubmissionClient, target: str) -> Any:
    """By submission id, run folder or run name; the newest. Raises ConfigError where there is none."""
    known = jobs_of(client)
    folder = str(Path(target).resolve())
    for job in known:
        metadata: Mapping[str, str] = job.metadata or {}
        if target in (job.submission_id, metadata.get(RUN)) or metadata.get(FOLDER) == folder:
            return job
    names = ", ".join(str(job.submission_id) for job in known) or "none"
    raise ConfigError.at("job", target, f"no such job or run on this cluster; jobs there: {names}")


def describe(job: Any) -> str:
    """One line of `plait status`."""
    began = "not begun"
    if job.start_time is not None:
        began = f"since {datetime.fromtimestamp(job.start_time / 1000).isoformat(' ', 'seconds')}"
    return f"{job.submission_id}  {job.status.value}  {began}  {job.metadata[FOLDER]}"


def to_json(job: Any) -> dict[str, Any]:
    """The same for programs; what is not known is absent."""
    found = {"job": job.submission_id, "status": job.status.value, "folder": job.metadata[FOLDER]}
    return found if job.start_time is None else {**found, "started": job.start_time / 1000}
