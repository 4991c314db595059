"""A learner's state on disk, without a run around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plait.engine.learner import LearnerWorker
from plait.engine.learners import LearnerGroup


def save_state(learner: LearnerWorker | LearnerGroup, folder: Path) -> list[str]:
    """Write it to the end; returns what `load` takes."""
    learner.save(str(folder))
    written: Any = learner.saved(wait=True)
    records = written if isinstance(written, list) else [written]
    return [str(folder / record.path) for record in records]
