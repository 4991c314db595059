"""Take the last steps of a run once more, from a checkpoint and the journal, and compare them with what it recorded.

Nothing is sampled, and the run stays as it is. Batch (ids and outcomes of the prompts), losses, gradient norms and the
digest of the weights must be equal to the bit.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .checkpoint import load, step_of
from .config import EvalConfig, LoopConfig
from .errors import CheckpointError
from .loop import Parts, begins_next, take_step
from .run_state import RunState
from .step_record import read_records
from .step_rollouts import Planned
from .sync_proof import digest
from .types import Rollout, RolloutRequest, Sampling


@dataclass(frozen=True)
class Replayed:
    start: int
    """Completed steps of the checkpoint that it started from; 0: the initial model."""
    steps: tuple[int, ...]
    """Those that were compared."""
    differences: tuple[str, ...]

    def lines(self) -> list[str]:
        what = f"step {self.steps[-1]}"
        if len(self.steps) > 1:
            what = f"steps {self.steps[0]} to {self.steps[-1]}"
        if not self.differences:
            return [
                f"verified: {what} from checkpoint {self.start}: batch, losses and weights are equal"
            ]
        return [f"NOT the same: {what} from checkpoint {self.start}", *self.differences]


class NothingSampled:
    """contracts.RolloutPool of a replay: all rollouts are in the journal, or it cannot be made."""

    def generate(
        self, requests: Sequence[RolloutRequest], *, step: int
    ) -> Generator[Rollout, None, None]:
        raise CheckpointError(
            f"the journal does not hold the rollouts of step {step + 1}, so it cannot be repeated"
        )

    def interrupt(self) -> Sequence[Rollout]:
        return ()

    def receivers(self) -> Sequence[Any]:
        return ()

    def prove(
        self, version: int, probes: Sequence[Sequence[int]], receivers: Sequence[Any]
    ) -> Sequence[Any]:
        return ()

    def admit(self, version: int, receivers: Sequence[Any], sync: Any) -> None:
        """Nobody serves."""

    def status(self) -> Sequence[Mapping[str, Any]]:
        return ()

    def close(self) -> None: ...


def replay(
    config: LoopConfig, evaluation: EvalConfig, sampling: Sampling, parts: Parts
) -> Replayed:
    """Raises CheckpointError where the run recorded no step, or what it takes to repeat one is gone.

    The learner is left as it was after the last recorded step.
    """
    records = {record.step: record for record in read_records(parts.log.folder)}
    last = max(records)
    state = start_before(last, parts)
    start = state.step
    parts.learners.connect(())
    state.weights = digest(parts.learners.send_weights(state.policy_version))
    differences: list[str] = []
    planned: Planned | None = None
    while state.step < last:
        ahead = state.step + 1 < last and begins_next(config, evaluation, parts, state)
        done = take_step(config, sampling, parts, state, planned, ahead=ahead)
        planned = done.next
        if state.advance(done.reports):
            state.weights = digest(parts.learners.send_weights(state.policy_version))
        if state.step in records:
            differences += done.record(state).differences(records[state.step])
    compared = tuple(step for step in sorted(records) if start < step)
    return Replayed(start, compared, tuple(differences))


def start_before(last: int, parts: Parts) -> RunState:
    """The newest checkpoint before step `last`, loaded; the initial model where there is none.

    Raises CheckpointError where it is damaged.
    """
    for folder in reversed(parts.checkpoints.complete()):
        if step_of(folder) >= last:
            continue
        saved = parts.checkpoints.verified(folder)
        return load(saved, parts.algorithm, parts.data, parts.learners)
    return RunState()
