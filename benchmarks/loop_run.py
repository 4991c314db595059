"""The real loop, one step at a time, around parts that a benchmark chooses."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal, cast

from plait.engine import loop
from plait.engine.checkpoint import Checkpoints
from plait.engine.config import CheckpointConfig, EvalConfig, LoopConfig
from plait.engine.contracts import Algorithm
from plait.engine.journal import Journal
from plait.engine.metrics import RunLog
from plait.engine.sync_proof import Tolerance
from plait.engine.types import Sampling

FOREVER = 10**9
NO_EVALUATION = EvalConfig(num_prompts=0)


class Silence:
    """A console for nobody."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


class LoopRun:
    """A run without checkpoints and evaluation, and without an end; journal and metrics are written as ever."""

    def __init__(
        self,
        folder: Path,
        algorithm: Algorithm,
        sampling: Sampling,
        num_prompts: int,
        *,
        data: Any,
        rollouts: Any,
        scorer: Any,
        learners: Any,
        dtype: Literal["float32", "bfloat16"] = "float32",
        staleness: Literal[0, 1] = 0,
        extra_prompts: int = 0,
        probes: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        self.sampling = sampling
        self.config = LoopConfig(
            steps=FOREVER,
            prompts_per_step=num_prompts,
            staleness=staleness,
            extra_prompts=extra_prompts,
        )
        self._planned: loop.Planned | None = None
        self.parts = loop.Parts(
            algorithm=algorithm,
            data=data,
            rollouts=rollouts,
            scorer=scorer,
            learners=learners,
            checkpoints=Checkpoints(folder / "checkpoints", CheckpointConfig()),
            log=RunLog(folder, cast(Any, Silence())),
            probes=probes,
            tolerance=Tolerance.for_dtype(dtype),
            journal=Journal(folder / "journal", 0, lambda message: None),
        )
        self.state = loop.begin(self.config, NO_EVALUATION, sampling, self.parts, None)

    def step(self) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        settings = self.config, NO_EVALUATION, self.sampling, self.parts, self.state
        self._planned = loop.go_on(*settings, self._planned)
        return time.perf_counter() - started

    def close(self) -> None:
        self.parts.log.close()
