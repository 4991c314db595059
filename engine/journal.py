"""The journal of a run: what was sampled for each step, on disk before the first update of that step.

    RUN/journal/step-NNNNNN.json        a SavedBatch: the scored rounds of step N

A run that restarts before step N takes the rounds from here as long as they fit: sampled with the run's seed from the
weights that are there now, for the same requests. So a process that dies loses nothing that was sampled, and updates
are repeated to the bit. Entries are kept back to the checkpoint before the last one, so that falling back to it, and
`plait resume --verify`, find them too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .durable import replace_durably, storage_errors
from .errors import DataError
from .saved_batch import SavedBatch, digest_of, read_batch, save_rounds, to_bytes
from .types import Prompt, RolloutGroup, RolloutRequest

if TYPE_CHECKING:
    from .run_state import RunState


class Journal:
    """`seed` is the run's; `say` tells a person why an entry is not used."""

    def __init__(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        self.folder, self.seed, self._say = folder, seed, say
        self._last = ""
        """sha256 of the last entry that this process wrote or used; "": of none."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, step: int) -> Path:
        """The entry of the step after `step` completed ones."""
        return self.folder / f"step-{step + 1:06d}.json"

    def recall(self, state: RunState) -> SavedBatch | None:
        """What an earlier process sampled for the next step; None where nothing is there that fits."""
        path = self.path(state.step)
        if not path.exists():
            return None
        try:
            entry = read_batch(path)
        except DataError as error:
            return self._refuse(str(error))
        version = state.policy_version
        if (entry.step, entry.seed, entry.policy_version) != (state.step, self.seed, version):
            return self._refuse(
                f"{path}: of step {entry.step}, seed {entry.seed}, policy version {entry.policy_version}; "
                f"this is step {state.step}, seed {self.seed}, version {version}"
            )
        # Outside deterministic mode a repeated update may differ in its last bits from the one that was sampled from.
        if entry.weights != state.weights and not (self._last and entry.follows == self._last):
            return self._refuse(f"{path}: sampled from other weights than those of this run")
        self._last = digest_of(path.read_bytes())
        return entry

    def _refuse(self, why: str) -> None:
        self._last = ""
        self._say(f"journal: {why}. The step is sampled again")

    def write(
        self,
        state: RunState,
        prompts: Sequence[Prompt],
        rounds: Sequence[tuple[Sequence[RolloutRequest], Sequence[RolloutGroup]]],
    ) -> None:
        """Durable when it returns. Raises CheckpointError where the disk takes no more."""
        path = self.path(state.step)
        everyone, packed = save_rounds(prompts, rounds)
        entry = SavedBatch(
            state.step,
            everyone,
            packed,
            policy_version=state.policy_version,
            weights=state.weights,
            seed=self.seed,
            follows=self._last,
        )
        data = to_bytes(path, entry)
        with storage_errors(path, "The journal of rollouts could not be written"):
            replace_durably(path, data.decode())
        self._last = digest_of(data)

    def prune(self, checkpoints: Sequence[Path]) -> None:
        """Remove what no run will ask for again; `checkpoints`: the complete ones, step-NNNNNN, oldest first."""
        if len(checkpoints) < 2:
            return
        needed = checkpoints[-2].name
        for path in self.folder.glob("step-*.json"):
            if path.stem <= needed:
                path.unlink()
