"""What a run is made of, recorded in RUN/identity.json, and what has changed when it is resumed.

Every field of the recipe with its value, the model's files and the tokenizer's by digest, and the versions of the
packages that matter. The data set's own fingerprint is in the checkpoint (`Data.load_state_dict`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..engine.durable import replace_durably, storage_errors
from ..engine.errors import CheckpointError, ConfigError, Problem
from ..engine.manifest import sealed, unsealed
from .config import Recipe

IDENTITY_FILE = "identity.json"
WEIGHTS = ("config.json", "*.safetensors")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt")
BLOCK, BLOCKS = 1 << 20, 1024
"""Of a file larger than this many bytes times blocks, evenly spaced blocks are read."""
FREE = (
    "run.name",
    "run.dir",
    "run.wait_seconds",
    "checkpoint.*",
    "loop.save_batch_every",
    "*.max_restarts",
    "loop.stall_seconds",
    "rollouts.max_reissues",
    "*.silence_seconds",
    "*.place_seconds",
    "*timeout_seconds",
)
"""Fields that change no number of a run."""
FIXED = (
    "run.seed",
    "algorithm.type",
    "data.*",
    "eval.num_prompts",
    "rollouts.max_prompt_length",
    "learner.parameter_selection*",
)
"""Fields on which what a checkpoint holds depends."""
MOVABLE = ("data.path", "data.probe", "model.path")
"""Places, not contents: these are compared by digest."""
ABSENT = "(absent)"


def identity_of(recipe: Recipe, model_path: str) -> dict[str, Any]:
    """`model_path`: what `resolve_model` made of the recipe's."""
    from .run import package_versions

    folder = local_folder(model_path)
    return {
        "config": dict(flatten(recipe, recipe.model_dump(mode="json"))),
        "model": digests(folder, WEIGHTS),
        "tokenizer": digests(folder, TOKENIZER),
        "versions": package_versions(),
    }


def local_folder(model_path: str) -> Path | None:
    """Where the model's files are; None for a hub model that is not in the cache yet."""
    if os.path.isdir(model_path):
        return Path(model_path)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model_path, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def digests(folder: Path | None, patterns: Sequence[str]) -> dict[str, str] | None:
    """File name -> digest of its content; None where the files are not known."""
    if folder is None:
        return None
    files = sorted(
        {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    )
    with ThreadPoolExecutor(4) as threads:
        return dict(zip((file.name for file in files), threads.map(digest_of, files), strict=True))


def digest_of(file: Path) -> str:
    """sha256 of size and content; of a very large file, of blocks evenly spaced over it."""
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    whole = size <= BLOCK * BLOCKS
    starts = (
        range(0, size, BLOCK)
        if whole
        else [i * (size - BLOCK) // (BLOCKS - 1) for i in range(BLOCKS)]
    )
    with file.open("rb") as data:
        for start in starts:
            data.seek(start)
            found.update(data.read(BLOCK))
    return found.hexdigest()


def flatten(
    section: BaseModel, dumped: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of each field; a list is a value, and so is a mapping whose keys are the user's."""
    for name, value in dumped.items():
        inner = getattr(section, name)
        if isinstance(inner, BaseModel):
            yield from flatten(inner, value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def record(folder: Path, identity: Mapping[str, Any]) -> None:
    with storage_errors(folder, "the run folder cannot be written"):
        replace_durably(folder / IDENTITY_FILE, sealed(identity))


def recorded(folder: Path) -> dict[str, Any] | None:
    """Of the run in `folder`: its identity.json, or where that is damaged, the newest checkpoint's copy.

    None for a run that ended before it was recorded. Raises CheckpointError where neither can be read.
    """
    from ..engine.checkpoint import Checkpoints
    from ..engine.config import CheckpointConfig
    from ..engine.manifest import Manifest

    kept = Checkpoints(folder / "checkpoints", CheckpointConfig()).complete()
    file = folder / IDENTITY_FILE
    if not file.exists() and not kept:
        return None
    try:
        return unsealed(file)
    except CheckpointError:
        for checkpoint in reversed(kept):
            try:
                return dict(Manifest.read(checkpoint).identity)
            except CheckpointError:
                continue
        raise


def refuse_changes(
    then: Mapping[str, Any], now: Mapping[str, Any], named: Sequence[str], run: Path
) -> list[str]:
    """What has changed and is accepted, one line each.

    `named`: fields given on the command line, which may therefore differ. Raises ConfigError with every other
    difference, then -> now.
    """
    problems: list[Problem] = []
    accepted: list[str] = []
    for path, before, after in changed_fields(then["config"], now["config"]):
        change = f"{before!r} -> {after!r}" if path not in MOVABLE else f"{before} -> {after}"
        if matches(path, FREE):
            accepted.append(f"{path}: {change}")
        elif matches(path, FIXED) and path not in MOVABLE:
            problems.append(
                Problem(path, ..., f"{change}, which a run cannot change; {new_run(run)}")
            )
        elif covered(path, named):
            accepted.append(f"{path}: {change}")
        else:
            remedy = f"restore it, or name it to accept it: plait resume {run} {path}=..."
            problems.append(Problem(path, ..., f"{change} since the run began; {remedy}"))
    for part in ("model", "tokenizer"):
        problems += changed_files(part, then.get(part), now.get(part), run)
    if problems:
        raise ConfigError(problems)
    for name, before, after in changed_fields(then.get("versions", {}), now["versions"]):
        accepted.append(f"version of {name}: {before} -> {after}")
    return accepted


def changed_fields(
    then: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """(field, value then, value now); a field that the run's plait did not know has its default and is left out."""
    for path in then:
        after = now.get(path, ABSENT)
        if after != then[path]:
            yield path, then[path], after


def changed_files(part: str, then: Any, now: Any, run: Path) -> Iterator[Problem]:
    if then is None or now is None:  # a hub model that was not in the cache
        return
    for name in sorted({*then, *now}):
        before, after = then.get(name, ABSENT), now.get(name, ABSENT)
        if before != after:
            change = f"{name} {before[:12]} -> {after[:12]} (sha256)"
            yield Problem(part, ..., f"{change} since the run began; restore it, or {new_run(run)}")


def matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def covered(path: str, named: Sequence[str]) -> bool:
    """Whether a field, a section around it, or something inside it was named."""
    return any(
        path == name or path.startswith(f"{name}.") or name.startswith(f"{path}.") for name in named
    )


def new_run(run: Path) -> str:
    return f"start a new run, for example from this one's export: model.path={run / 'export'} run.name=..."
