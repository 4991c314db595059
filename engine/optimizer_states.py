"""Several sets of AdamW moments over the same weights.

DeepSpeed wraps a torch optimizer whose `state` holds the moments of this rank's master weights. "main" always lives
there, where DeepSpeed's own checkpoint finds it; any other set is put there for the duration of one step and kept, and
saved, by this class.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .master_weights import inner_optimizer, master_weights

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
        inner.step = lambda closure=None: None
        try:
            yield
        finally:
            del inner.step  # the class's own again

    def save(self, folder: Path, rank: int) -> None:
        """One file a set and rank, beside DeepSpeed's own."""
        for name, states in self._others.items():
            place = {parameter: i for i, parameter in enumerate(master_weights(self._engine))}
            content = {place[parameter]: state for parameter, state in states.items()}
            torch.save(content, folder / _file(name, rank))

    def load(self, folder: Path, rank: int) -> None:
        """Raises CheckpointError where the folder holds a set for other ranks only."""
        self._others.clear()
        weights = master_weights(self._engine)
        for name in sorted({path.name.split("-")[1] for path in folder.glob(_file("*", "*"))}):
            path = folder / _file(name, rank)
            if not path.exists():
                raise CheckpointError(
                    f"{path} is missing: the checkpoint was written by another number of ranks"
                )
            content = torch.load(path, map_location="cpu", weights_only=True)
            states = self._others[name] = defaultdict(dict)
            for i, state in content.items():
                states[weights[i]] = {k: _beside(v, weights[i]) for k, v in state.items()}

    @property
    def _inner(self) -> Any:
        return inner_optimizer(self._engine)


def _file(name: str, rank: int | str) -> str:
    return f"optimizer-{name}-rank-{rank}.pt"


def _beside(value: Any, weight: Tensor) -> Any:
    return value.to(weight.device) if isinstance(value, Tensor) else value
