"""The commands about jobs: `plait submit | preflight | status | stop` (docs/jobs.md)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..engine.errors import ClusterError, ConfigError
from .config import find_recipe, load_recipe

Address = Annotated[
    str | None,
    typer.Option(help="Job server, such as http://head:8265; default: RAY_API_SERVER_ADDRESS."),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Also on a cluster that asks nobody for a token.")
]
DETACHED = 130


def add_to(app: typer.Typer) -> None:
    for command in (submit, preflight, status, stop):
        app.command()(command)


def submit(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value ...")] = None,
    address: Address = None,
    working_dir: Annotated[
        Path, typer.Option(help="Folder that the job gets a copy of; holds recipe, reward, data.")
    ] = Path(),
    grace: Annotated[
        int, typer.Option(min=1, help="Seconds a stopped run has for its checkpoint.")
    ] = 60,
    preflight: Annotated[bool, typer.Option(help="Check every node first.")] = True,
    follow: Annotated[bool, typer.Option(help="Print the job's output until it ends.")] = True,
    insecure: Insecure = False,
) -> None:
    """Train a recipe as a job of a Ray cluster; a run that exists is continued. Exit code: the run's."""
    from . import submit as jobs

    loaded = load_recipe(recipe, overrides or ())
    file = find_recipe(recipe)
    source = recipe
    if Path(recipe).is_file():
        if not file.resolve().is_relative_to(working_dir.resolve()):
            raise ConfigError.at("recipe", recipe, f"lies outside of --working-dir {working_dir}")
        source = str(file.resolve().relative_to(working_dir.resolve()))
    what = jobs.Submission(loaded, source, overrides or (), working_dir, grace, insecure)
    client = jobs.connect(address)
    jobs.refuse_second(client, what.folder)
    if preflight and (code := jobs.follow(client, jobs.start(client, what, "preflight"))):
        print("refused by the preflight; nothing was started")
        raise typer.Exit(code)
    job = jobs.start(client, what, "train")
    print(f"job {job}, run folder {what.folder}", flush=True)
    if not follow:
        return
    try:
        code = jobs.follow(client, job)
    except KeyboardInterrupt:
        print(f"\nthe job goes on: `plait status {job}`, `plait stop {job}`")
        raise typer.Exit(DETACHED) from None
    raise typer.Exit(code)


def preflight(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value ...")] = None,
    insecure: Insecure = False,
) -> None:
    """Check every node of the cluster that RAY_ADDRESS names, else of this machine, for a recipe."""
    from .cluster import INSECURE, ray_cluster
    from .job import settle
    from .preflight import preflight as run

    if insecure:
        os.environ[INSECURE] = "1"
    loaded = settle(load_recipe(recipe, overrides or ()))
    with ray_cluster():
        checks = run(loaded)
    print("\n".join(map(str, checks)))
    refused = [check.name for check in checks if check.problem]
    if refused:
        raise ClusterError(f"refused: {', '.join(refused)}; the lines above say why")


def status(
    target: Annotated[
        str | None, typer.Argument(help="A run folder, run name or job; default: every job.")
    ] = None,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """What a run does at this moment, or every job of the cluster."""
    from . import submit as jobs
    from .run_folder import CONFIG_FILE
    from .run_status import describe_run, read_status

    if target is None:
        every = jobs.jobs_of(jobs.connect(address))
        lines = "\n".join(map(jobs.describe, every)) or "no job of plait here"
        print(json.dumps([*map(jobs.to_json, every)]) if as_json else lines)
        return
    folder, found = Path(target), dict[str, Any]()
    lines = []
    if not folder.is_dir():
        job = jobs.find_job(jobs.connect(address), target)
        folder, found["job"] = Path(job.metadata[jobs.FOLDER]), jobs.to_json(job)
        lines.append(jobs.describe(job))
    if lines and not (folder / CONFIG_FILE).is_file():
        lines.append(f"{folder} holds no run yet, or is not to be seen from this machine")
    else:
        found |= read_status(folder)
        lines += describe_run(folder, found)
    print(json.dumps(found) if as_json else "\n".join(lines))


def stop(
    target: Annotated[str, typer.Argument(help="A job, or the run folder or name of one.")],
    address: Address = None,
) -> None:
    """Ask a job to write a checkpoint and end; submitting it again continues."""
    from . import submit as jobs

    job, state = jobs.stop(jobs.connect(address), target)
    print(f"job {job}: {state}")
