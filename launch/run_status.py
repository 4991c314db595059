"""`plait status RUN`: where a run stands, read from its folder; nothing is asked of its processes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine.errors import ConfigError
from ..engine.status import STATUS_FILE
from .run import CONFIG_FILE, SUMMARY_FILE

SILENT_SECONDS = 10.0
"""The driver writes each second."""


def read_status(folder: Path) -> dict[str, Any]:
    """`status` (what the driver last said, and how long ago), `metrics` of the last step, `checkpoints`, `summary`.

    What is not there yet is absent. Raises ConfigError where the folder holds no run.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError.at("run", str(folder), f"no run there: it holds no {CONFIG_FILE}")
    found: dict[str, Any] = {"folder": str(folder)}
    if (folder / STATUS_FILE).is_file():
        found["status"] = json.loads((folder / STATUS_FILE).read_text())
        found["status_age_seconds"] = time.time() - (folder / STATUS_FILE).stat().st_mtime
    steps = [row for row in complete_lines(folder / "metrics.jsonl") if "step" in row]
    if steps:
        found["metrics"] = steps[-1]
    found["checkpoints"] = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    if (folder / SUMMARY_FILE).is_file():
        found["summary"] = json.loads((folder / SUMMARY_FILE).read_text())
    return found


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """A line that is being written at this moment is left out."""
    if not path.is_file():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def describe_run(folder: Path, found: Mapping[str, Any]) -> list[str]:
    """The same in lines."""
    lines = [f"run {folder}"]
    if "status" in found:
        lines += describe_status(found["status"], found["status_age_seconds"])
    if "metrics" in found:
        shown = ("reward/mean", "time/step", "tokens/policy", "tokens/expert")
        metrics = found["metrics"]
        values = [f"{name} {metrics[name]:g}" for name in shown if name in metrics]
        lines.append(", ".join([f"step {metrics['step']}", *values]))
    names = found["checkpoints"]
    lines.append(f"checkpoints: {', '.join(names) or 'none yet'}")
    if "summary" in found:
        summary = found["summary"]
        lines.append(f"ended by loop.{summary['ended_by']} after {summary['steps']} steps")
    return lines


def describe_status(status: Mapping[str, Any], age: float) -> list[str]:
    """What the driver does, and a line for each worker and rank."""
    phase = status["phase"]
    if phase == "ended":
        return [f"its process has ended, after {status['step']} steps"]
    lines = [
        f"{status['step']} steps done; {phase} for {status['phase_seconds']:g} s, waits for {status['waits_for']}"
    ]
    if age > SILENT_SECONDS:
        lines[0] = f"its process has been silent for {age:.0f} s; then: {lines[0]}"
    for row in (*status["rollout_workers"], *status["learner_ranks"]):
        lines.append("  " + ", ".join(f"{key} {value}" for key, value in row.items()))
    return lines
