"""`plait.train` and `plait.resume`: what the commands do, with reward functions passed as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..rewards import object_name
from .config import Raw, Recipe, read_recipe, validate

if TYPE_CHECKING:
    from ..engine.contracts import RewardFn


def train(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    reward: RewardFn | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a recipe to its end; returns what the run's summary.json holds.

    `recipe` is a file, the name of a shipped recipe, or the sections themselves; `overrides` are `key.path=value`
    texts. `reward` takes the place of `reward.function`, and needs no module: it travels to the scoring processes by
    cloudpickle. Raises ConfigError, DataError and the other errors of plait.engine.errors.

        plait.train("quickstart", ["loop.steps=5"], reward=lambda prompt, text: float(prompt.answer in text))
    """
    from .run import train as run

    return run(load(recipe, overrides, reward), overwrite=overwrite, reward=reward)


def resume(
    folder: str | Path, overrides: Sequence[str] = (), *, reward: RewardFn | None = None
) -> dict[str, Any]:
    """Continue the run in `folder` from its last checkpoint; a `reward` passed to `train` is passed again.

    Raises ConfigError where recipe, model or tokenizer have changed; what `overrides` name may change.
    """
    from .run import load_run
    from .run import train as run

    named = [override.partition("=")[0] for override in overrides]
    return run(load_run(Path(folder), overrides), resume=True, named=named, reward=reward)


def load(
    recipe: str | Path | Mapping[str, Any], overrides: Sequence[str], reward: RewardFn | None
) -> Recipe:
    """The recipe, with the name of `reward` where one is given. Raises ConfigError with every problem."""
    raw: Raw = dict(read_recipe(recipe, overrides))
    if reward is not None:
        section = raw.get("reward")
        others = section if isinstance(section, dict) else {}
        raw["reward"] = {**others, "function": object_name(reward)}
    return validate(raw)
