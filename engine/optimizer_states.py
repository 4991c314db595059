"""Several sets of AdamW moments over the same weights.

DeepSpeed wraps a torch optimizer whose `state` holds the moments of this rank's master weights. "main" always lives
there; any other set is put there for the duration of one step and kept by this class.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .master_weights import inner_optimizer

MAIN = "main"


class OptimizerStates:
    """The sets of one rank, by name; a set is empty until its first step."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._others: dict[str, dict[Tensor, dict[str, Any]]] = {}

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """The optimizer step inside reads and writes the moments of `name`."""
        if name == MAIN:
            yield
            return
        inner = self._inner
        main = inner.state
        inner.state = self._others.setdefault(name, defaultdict(dict))
        try:
            yield
        finally:
            self._others[name], inner.state = inner.state, main

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """The optimizer step inside clears the gradients, as any step does, and changes no weight and no moment."""
        inner = self._inner
        if "step" in vars(inner):  # inside another such block
            yield
            return
        inner.step = lambda closure=None: None
        try:
            yield
        finally:
            del inner.step  # the class's own again

    def sets(self) -> dict[str, Mapping[Tensor, dict[str, Any]]]:
        """Name -> master weight -> {"step": steps so far, "exp_avg": as large as the master weight, ...}."""
        return {MAIN: self._inner.state, **self._others}

    def restore(self, sets: Mapping[str, Mapping[Tensor, dict[str, Any]]]) -> None:
        """Replace all sets; `step` is a number."""
        inner = self._inner
        inner.state.clear()
        self._others.clear()
        for name, states in sets.items():
            target = (
                inner.state if name == MAIN else self._others.setdefault(name, defaultdict(dict))
            )
            for master, state in states.items():
                target[master] = {**state, "step": self._step_count(state["step"], master)}

    def _step_count(self, steps: float, master: Tensor) -> Any:
        """As this optimizer keeps it: torch in a tensor, DeepSpeed's CPU optimizer in a number."""
        if isinstance(self._inner, torch.optim.AdamW):
            return torch.tensor(float(steps), dtype=torch.float32, device=master.device)
        return int(steps)

    @property
    def _inner(self) -> Any:
        return inner_optimizer(self._engine)
