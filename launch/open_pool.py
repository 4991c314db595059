"""Rollout workers that outlive a run: starting vLLM costs more than a short run on a small machine."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from .config import Recipe
from .placement import reserve
from .run import rollout_dtype, start_pool


class OpenPool:
    """Rollout workers that several runs use, one run after the other; each run publishes its own weights to them."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._pool: Any = None
        self._made_for: tuple[Any, ...] = ()

    def lend(self, recipe: Recipe, model_path: str) -> Any:
        """The open pool, where it is such as this recipe wants; else it is closed and another one starts.

        None where only workers of the run's own will do.
        """
        wanted = (model_path, recipe.samplers, rollout_dtype(recipe))
        # Only plait's own transfer is known to let a worker meet a second learner.
        reusable = recipe.rollouts.weight_sync == "shared_memory"
        if not reusable:
            self.close()
            return None
        if self._pool is None or self._made_for != wanted:
            self.close()
            seats = self._stack.enter_context(reserve(recipe, learner=False))
            self._pool = start_pool(recipe, model_path, seats, self._stack)
            self._made_for = wanted
        self._pool.seed = recipe.run.seed
        return self._pool

    def close(self) -> None:
        """Also after a failure: what the workers serve is undefined when a weight sync broke off."""
        self._stack.close()
        self._pool = None
