"""The recipe's reward functions: found before anything starts, and run in scoring processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.errors import ConfigError
from ..rewards import OBJECT, object_name, resolve
from ..rewards.config import RewardConfig
from ..rollouts.records import Records

if TYPE_CHECKING:
    from ..engine.contracts import RewardFn
    from ..rewards.scorer import ProcessScorer
    from .config import Recipe

UNKNOWN_FILE = "unknown_rewards.jsonl"


def check_functions(
    reward: RewardConfig, records: Records, function: RewardFn | None = None
) -> None:
    """Raises ConfigError where a function that the recipe or a row names cannot be had.

    `function` is the verifier where Python code passed it; it must be the one that the recipe names.
    """
    if function is not None and object_name(function) != reward.function:
        raise ConfigError.at(
            "reward.function", reward.function, f"the function passed is {object_name(function)!r}"
        )
    resolve(reward.function, options=reward.options, function=function)
    for i, part in enumerate(reward.shaping):
        path = f"reward.shaping[{i}].function"
        resolve(part.function, path=path, options=part.options)
    for name in records.rewards - {reward.function}:
        resolve(name)


def open_scorer(
    recipe: Recipe, folder: Path | None = None, function: RewardFn | None = None
) -> ProcessScorer:
    """Scoring processes, starting in the background; inputs of UNKNOWN scores are kept in `folder`.

    Raises ConfigError where the recipe has no reward.
    """
    if recipe.reward is None:
        raise ConfigError.at("reward", None, "required here; name one, for example math")
    from ..rewards.scorer import ProcessScorer

    return ProcessScorer(
        recipe.reward,
        os.getcwd(),
        folder / UNKNOWN_FILE if folder else None,
        max_response_length=recipe.rollouts.max_response_length,
        function=function if recipe.reward.function.startswith(OBJECT) else None,
    )
