"""Some steps of the quickstart recipe, SmolLM2-135M with CHORD: what shares of a real step are measured on.

python benchmarks/quickstart_run.py 5 key=value ...     the share of each phase, as a table
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

OUTSIDE = ("rollout", "wait_for_update", "update", "sync")
"""Phases in which workers work, one after the other."""
BESIDE = "first_rows"
"""While the samplers work."""


def quickstart_steps(steps: int, *overrides: str) -> list[dict[str, Any]]:
    """The metrics of each step but the first, which warms up. Raises CalledProcessError where the run fails."""
    with TemporaryDirectory() as folder:
        settings = {
            "run.dir": folder,
            "run.name": "run",
            "loop.steps": steps + 1,
            "eval.num_prompts": 0,
            "checkpoint.every": 0,
        }
        given = [f"{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "plait.launch", "train", "quickstart", *given, *overrides]
        subprocess.run(command, check=True)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if "time/step" in row][1:]


def share_of_steps(rows: list[dict[str, Any]], phase: str) -> list[float]:
    """Of each step; `phase`: "sync", or "control" for what is left when the workers' phases are taken off."""
    if phase != "control":
        return [row[f"time/{phase}"] / row["time/step"] for row in rows]
    return [
        1 - sum(row.get(f"time/{name}", 0.0) for name in OUTSIDE) / row["time/step"] for row in rows
    ]


def phases(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a table: median seconds of each phase, and its share of the step."""
    names = [k.removeprefix("time/") for k in rows[0] if k.startswith("time/")]
    named = [name for name in names if name not in ("step", "steps_so_far")]
    step = median(row["time/step"] for row in rows)
    seconds = {name: median(row[f"time/{name}"] for row in rows) for name in named}
    seconds["between phases"] = median(
        row["time/step"] - sum(row[f"time/{name}"] for name in named if name != BESIDE)
        for row in rows
    )
    lines = [f"| {name} | {s:.2f} | {s / step:.1%} |" for name, s in seconds.items()]
    head = ["| phase | seconds | share |", "|---|---|---|"]
    return [*head, *lines, f"| step | {step:.2f} | {len(rows)} steps |"]


if __name__ == "__main__":
    print("\n".join(phases(quickstart_steps(int(sys.argv[1]), *sys.argv[2:]))))
