"""The run folder before anything starts: new, emptied, or one that is continued."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine.checkpoint import Checkpoints
from ..engine.durable import replace_durably, storage_errors
from ..engine.errors import ConfigError
from ..engine.status import STATUS_FILE
from .config import Recipe
from .identity import recorded, refuse_changes
from .run_lock import LOCK_FILE

CONFIG_FILE, SUMMARY_FILE, CHECKPOINTS = "config.yaml", "summary.json", "checkpoints"


def prepare_folder(recipe: Recipe, *, overwrite: bool) -> None:
    """Write the resolved recipe into the run folder, whose lock the caller holds.

    An existing run is never touched silently.
    """
    folder = recipe.folder
    saved = Checkpoints(folder / CHECKPOINTS, recipe.checkpoint).complete()
    if saved or (folder / CONFIG_FILE).exists():
        if not overwrite:
            raise ConfigError.at(
                "run.name",
                recipe.run.name,
                f"{folder} already holds a run; continue it with --continue or `plait resume {folder}`, "
                "choose another run.name, or replace it with --overwrite",
            )
        clear(folder)
    write_config(recipe)


def clear(folder: Path) -> None:
    """Remove everything but the lock, which the caller holds."""
    for path in folder.iterdir():
        if path.name == LOCK_FILE:
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write_config(recipe: Recipe) -> None:
    with storage_errors(recipe.folder, "the run folder cannot be written"):
        replace_durably(recipe.folder / CONFIG_FILE, recipe.to_yaml())


def check_resumable(recipe: Recipe, identity: dict[str, Any], named: Sequence[str]) -> None:
    """Say what has changed since the run began, and keep to it from now on.

    Raises ConfigError where a field that is not `named`, the model or the tokenizer has changed.
    """
    then = recorded(recipe.folder)
    if then is not None:
        for line in refuse_changes(then, identity, named, recipe.folder):
            print(f"changed: {line}", flush=True)
    if not Checkpoints(recipe.folder / CHECKPOINTS, recipe.checkpoint).complete():
        print(f"{recipe.folder} holds no checkpoint yet: the run begins at step 0", flush=True)
    write_config(recipe)
    for name in (SUMMARY_FILE, STATUS_FILE):  # of an end that is no end any more
        (recipe.folder / name).unlink(missing_ok=True)
