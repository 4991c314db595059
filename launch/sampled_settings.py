"""What a model's answers to a recipe's prompts depend on: kept beside collected rows, compared when they are used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.errors import ConfigError, Problem
from ..rollouts.probe_table import read_rates

if TYPE_CHECKING:
    from .config import Recipe

Row = Mapping[str, Any]
PROBE_SETTINGS = "probe.json"
NOT_READ = ("sampling", "filter", "admission", "probe", "eval_sets")
"""Fields of `data` that change neither prompts nor their order."""


def sampling_settings(recipe: Recipe) -> dict[str, Any]:
    """What answers of a model to the recipe's training prompts, and their grades, depend on."""
    raw = recipe.model_dump(mode="json")
    reward = raw["reward"] or {}
    return {
        "data": {name: value for name, value in raw["data"].items() if name not in NOT_READ},
        "reward": {key: reward.get(key) for key in ("function", "options")},
        "seed": recipe.run.seed,
        "sampling": asdict(recipe.sampling),
        "max_prompt_length": recipe.rollouts.max_prompt_length,
        "eval_prompts": recipe.eval.num_prompts,
    }


def probed_settings(recipe: Recipe) -> dict[str, Any]:
    """Of `settings`, what a run that reads the table shares with it."""
    return {"model": recipe.model.path, **sampling_settings(recipe)}


def check_table(recipe: Recipe) -> None:
    """Raises ConfigError or DataError where `data.probe` is no table, or one of another model, data set, reward or
    way to sample.
    """
    if recipe.data.probe is None:
        return
    path = Path(recipe.data.probe)
    read_rates(path)
    known = read_settings("data.probe", path.parent / PROBE_SETTINGS)
    refuse_other_settings("data.probe", path, known, probed_settings(recipe))


def read_settings(field: str, path: Path) -> dict[str, Any]:
    """Raises ConfigError for `field` where there are none."""
    if not path.is_file():
        raise ConfigError.at(field, str(path), "no such file; it belongs to the rows beside it")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError.at(field, str(path), f"not valid JSON: {error}") from error


def refuse_other_settings(field: str, where: Path, known: Row, now: Row) -> None:
    """Raises ConfigError for `field`, naming the setting in which rows that lie at `where` differ."""
    for key, value in now.items():
        if known.get(key) != value:
            raise ConfigError.at(
                field,
                str(where),
                f"it holds rows of other settings: {key} was {known.get(key)}, now {value}; choose another",
            )


def unread_table(recipe: Recipe) -> list[Problem]:
    """A table of a probe that nothing reads, or a gate that has none."""
    sections = recipe.algorithm.sections.items()
    gates = [name for name, s in sections if getattr(s, "skip_out_of_reach_steps", 0)]
    data = recipe.data
    if data.probe is None:
        return [
            Problem(
                f"{name}.skip_out_of_reach_steps",
                ...,
                "needs data.probe, the rates.jsonl that `plait probe` writes",
            )
            for name in gates
        ]
    if gates or data.observing is not None:
        return []
    message = (
        "nothing reads it; set data.sampling = difficulty, data.filter, or algorithm.skip_out_of_reach_steps (hpt, "
        "relift, super_rl), or leave it out"
    )
    return [Problem("data.probe", data.probe, message)]
