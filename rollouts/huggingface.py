"""Hugging Face data sets: a hub id, a folder written by `save_to_disk`, a folder of files, or one file.

No code of a data set is ever run, and nothing outside of a local folder is read on its behalf: links that lead out of
it, and file lists with `..`, absolute paths or addresses, are refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ..engine.errors import ConfigError, DataError, HubError
from .config import HuggingFaceRows
from .rows import TableRows

FILE_FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".arrow": "arrow",
}
LISTS = ("README.md", "state.json", "dataset_info.json", "dataset_dict.json")
"""Files of a folder that may name others."""
NAMING = ("_data_files", "_indices_data_files", "_indices_files", "splits")
"""What they name them by; a split is a folder."""


def open_table(config: HuggingFaceRows) -> TableRows:
    """Raises ConfigError, DataError, or HubError where the hub does not answer."""
    path = Path(config.path)
    table = _load_table(config)
    return TableRows(table, path.name if path.exists() else config.path, config.max_rows)


def _load_table(config: HuggingFaceRows) -> Any:
    path = Path(config.path)
    looks_local = path.is_absolute() or config.path.startswith(".") or path.suffix in FILE_FORMATS
    if looks_local and not path.exists():
        raise ConfigError.at("data.path", config.path, "no such file or folder")
    if path.is_file() and path.suffix not in FILE_FORMATS:
        raise ConfigError.at(
            "data.path", config.path, f"unknown file type; use one of {', '.join(FILE_FORMATS)}"
        )

    if path.is_dir():
        refuse_escapes(path)

    import datasets
    from datasets.exceptions import DatasetsError

    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(config.path)
            return loaded[config.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        if path.is_file():
            return _load_file(path, config.split)
        return datasets.load_dataset(config.path, config.name, split=config.split)
    except KeyError as error:
        raise ConfigError.at("data.split", config.split, f"{config.path} has no {error}") from error
    except ConnectionError as error:
        raise HubError.at(
            "data.path",
            config.path,
            f"not a file or folder here, and the hub does not answer: {error}",
        ) from error
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        # RuntimeError: the data set is a script.
        raise DataError(f"{config.path}: datasets cannot load it: {error}") from error


def _load_file(path: Path, split: str) -> Any:
    import datasets

    # One file is one split: whatever the recipe calls it, `train[:100]` included.
    name = re.match(r"\w*", split)
    files = {(name[0] if name else "") or "train": str(path)}
    options: dict[str, Any] = {"sep": "\t"} if path.suffix == ".tsv" else {}
    return datasets.load_dataset(
        FILE_FORMATS[path.suffix], data_files=files, split=split, **options
    )


def refuse_escapes(folder: Path) -> None:
    """Raises DataError naming what leads out of the folder."""
    home = folder.resolve()
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            entry = Path(root) / name
            if entry.is_symlink() and not entry.resolve().is_relative_to(home):
                raise DataError(
                    f"{entry}: a link that leads out of {folder} (to {entry.resolve()}); copy the data into the folder"
                )
            if name in LISTS:
                for listed in _listed_files(entry):
                    _refuse_outside(listed, entry)


def _listed_files(path: Path) -> Iterator[str]:
    """Every text in a folder's own lists of files."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.name == "README.md":
            front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
            content = yaml.safe_load(front[1]) if front else None
            content = content.get("configs") if isinstance(content, dict) else None
        else:
            content = json.loads(text)
            content = [content.get(k) for k in NAMING] if isinstance(content, dict) else None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    yield from _texts(content)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _refuse_outside(name: str, listed_in: Path) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or "://" in name:
        raise DataError(
            f"{listed_in}: names {name!r}, which is not inside the data set's folder; remove it"
        )
