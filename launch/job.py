"""What differs for a run that Ray started as a job: its code, its folder, and that it may be started again.

`ray job submit --working-dir .` copies the folder to the cluster and starts the command in the copy, which Ray deletes
some time after the job.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import plait

from .config import Recipe

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable (its name is really this) by which Ray tells a job's command what it belongs to."""
HOME = "PLAIT_HOME"


def job_id() -> str | None:
    """The submission id of the job that runs us; None outside a job."""
    try:
        return json.loads(os.environ[JOB])["metadata"]["job_submission_id"]
    except KeyError:
        return None


def run_submitted_code() -> None:
    """In a job whose folder is a checkout of plait, go on with that code where another plait is installed.

    Replaces the process; returns where there is nothing to do.
    """
    source = Path.cwd() / "src"
    submitted = source / "plait" / "launch" / "__main__.py"
    running = Path(plait.__path__[0]) / "launch" / "__main__.py"
    if job_id() is None or not submitted.is_file() or submitted.samefile(running):
        return
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{source}{os.pathsep}{known}" if known else str(source)
    print(f"this job runs the plait that was submitted: {source}", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "plait.launch", *sys.argv[1:]])


def settle(recipe: Recipe) -> Recipe:
    """A job's run folder outlives the job: below $PLAIT_HOME, else ~/plait, where the recipe names no absolute one."""
    if job_id() is None or Path(recipe.run.dir).is_absolute():
        return recipe
    home = Path(os.environ.get(HOME) or Path.home() / "plait")
    place = recipe.run.model_copy(update={"dir": str(home.resolve() / recipe.run.dir)})
    settled = recipe.model_copy(update={"run": place})
    print(f"run folder {settled.folder} (run.dir = {recipe.run.dir} is relative)", flush=True)
    return settled
