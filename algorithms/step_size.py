"""How much one step may ask for: what `plait plan` adds up before anything starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """One optimizer phase: at most `rows` rows, in `minibatches` x `epochs` optimizer steps."""

    loss: str
    rows: int
    minibatches: int = 1
    epochs: int = 1

    @property
    def optimizer_steps(self) -> int:
        return self.minibatches * self.epochs


@dataclass(frozen=True)
class StepSize:
    """Upper bounds of one step, whatever the rollouts turn out to be worth.

    8 prompts of ghpo with groups of 4 and 3 hints, in the worst case all of them at every stage:

        StepSize(rollouts=128, rounds=4, expert_rows=0, phases=(Phase("main", 32),))
    """

    rollouts: int
    rounds: int
    expert_rows: int
    """Of the trained rows, those that are demonstrations (or stand in their place)."""
    phases: tuple[Phase, ...]

    @property
    def rows(self) -> int:
        return sum(phase.rows for phase in self.phases)

    @property
    def optimizer_steps(self) -> int:
        return sum(phase.optimizer_steps for phase in self.phases)
