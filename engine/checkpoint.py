"""Checkpoints: complete or invisible.

Everything is written into a hidden folder beside its final place, flushed, renamed, and only then named by the pointer
`latest`. A checkpoint holds the learner's DeepSpeed state and one JSON file with the rest of the run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .config import CheckpointConfig
from .contracts import Algorithm, DataSource, Learners
from .errors import CheckpointError
from .evaluation import EvalResult
from .metrics import num_policy_steps
from .types import RolloutGroup, UpdateReport

STATE_FILE = "state.json"


@dataclass
class RunState:
    """Where a run stands: what the checkpoint carries beside weights, data position and algorithm state."""

    step: int = 0
    """Completed loop steps."""
    policy_version: int = 0
    """Counts published weights; 0 are the initial ones."""
    syncs: int = 0
    """Weight syncs begun."""
    syncs_proved: int = 0
    """Weight syncs whose proof held; one that fails ends the run."""
    optimizer_steps: int = 0
    """Of the policy; a critic's are not counted."""
    weights: str = ""
    """Digest of the weights that the samplers serve."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Trained tokens so far, by source; "computed": all of the forward passes; "generated": sampled to train on."""
    step_seconds: float = 0.0
    """Wall time of the steps so far, evaluation and checkpoints left out."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time so far, by phase."""
    eval_before: EvalResult | None = None
    eval_after: EvalResult | None = None

    def advance(self, reports: Sequence[UpdateReport]) -> bool:
        """Account for one finished step; weights that changed get a new version. Returns whether they did."""
        moved = num_policy_steps(reports)
        self.step += 1
        self.policy_version += bool(moved)
        self.optimizer_steps += moved
        for report in reports:
            for source, n in report.tokens.items():
                self.tokens[source] = self.tokens.get(source, 0) + n
        return bool(moved)

    def count_generated(self, groups: Sequence[RolloutGroup]) -> None:
        """Add what a step sampled; forced prefixes were not sampled."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        generated = sum(len(rollout.token_ids) - rollout.prefix_len for rollout in rollouts)
        self.tokens["generated"] = self.tokens.get("generated", 0) + generated

    @property
    def trained_tokens(self) -> int:
        return self.tokens.get("policy", 0) + self.tokens.get("expert", 0)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunState:
        evals = {
            name: EvalResult(**values[name]) if values[name] else None
            for name in ("eval_before", "eval_after")
        }
        return cls(**{**values, **evals})


class Checkpoints:
    """The `checkpoints/` folder of one run."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self.every, self.keep = folder, config.every, config.keep
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(
        self, state: RunState, algorithm: Algorithm, data: DataSource, learners: Learners
    ) -> Path:
        """Write, rename, point, prune; returns the checkpoint's folder."""
        final = self.folder / f"step-{state.step:06d}"
        work = self.folder / f".{final.name}.partial"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        learners.save(str(work / "learner"))
        content = {
            "run": asdict(state),
            "algorithm": algorithm.state_dict(),
            "data": data.state_dict(),
        }
        write_durably(work / STATE_FILE, json.dumps(content, indent=1))
        sync_tree(work)
        if final.exists():
            shutil.rmtree(final)
        work.rename(final)
        sync_folder(self.folder)
        write_durably(self.folder / "latest.partial", final.name)
        (self.folder / "latest.partial").rename(self.folder / "latest")
        sync_folder(self.folder)
        for old in self.complete()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def complete(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*"))

    def latest(self) -> Path | None:
        """What the pointer names; None before the first checkpoint."""
        pointer = self.folder / "latest"
        if not pointer.exists():
            return None
        path = self.folder / pointer.read_text().strip()
        if not (path / STATE_FILE).exists():
            raise CheckpointError(
                f"{pointer} names {path.name}, which is not a complete checkpoint"
            )
        return path

    def restore(self, algorithm: Algorithm, data: DataSource, learners: Learners) -> RunState:
        """Load the latest checkpoint into all parts; a fresh state where there is none."""
        path = self.latest()
        if path is None:
            return RunState()
        content = json.loads((path / STATE_FILE).read_text())
        learners.load(str(path / "learner"))
        algorithm.load_state_dict(content["algorithm"])
        data.load_state_dict(content["data"])
        return RunState.from_json(content["run"])


def write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            with open(Path(root) / name, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
