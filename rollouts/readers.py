"""Where rows come from: JSONL files, Hugging Face data sets, reasoning-gym generators.

`read_records(config, num_eval)` is the light half of loading data: it reads, validates and splits,
and needs no tokenizer. A bad row is never skipped silently: all of them are listed at once.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ..engine.errors import ConfigError, DataError, HubError
from .config import HuggingFaceData, JsonlData, ReasoningGymData
from .order import derive_key
from .records import (
    BadRows,
    Record,
    Records,
    RowError,
    RowParser,
    check_encodable,
    check_templates,
    problem_key,
    split_held_out,
    with_system_prompt,
    wrap_prompt,
    write_demonstration,
)

FILE_FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".arrow": "arrow",
}


def read_records(
    config: ReasoningGymData | JsonlData | HuggingFaceData, num_eval: int = 0
) -> Records:
    """Read, validate and split a data set.

    Raises DataError naming file and line (or row) of up to 20 bad rows, or that nothing is left;
    ConfigError where the recipe's `data` section cannot be meant.
    """
    if isinstance(config, ReasoningGymData):
        return generate_reasoning_gym(config, num_eval)
    rows = read_jsonl(config) if isinstance(config, JsonlData) else read_huggingface(config)
    records = list(rows)
    if not records:
        raise DataError(f"{config.path}: the data set is empty")
    return split_held_out(records, num_eval, config.seed, config.path)


# ---------------------------------------------------------------------------------------- JSONL


def read_jsonl(config: JsonlData) -> Iterator[Record]:
    """One JSON object a line; blank lines are ignored. Ids default to `file.jsonl/<line>`."""
    path = Path(config.path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "no such file"
        raise ConfigError.at("data.path", config.path, what)
    parser = RowParser(config, path.name)
    bad = BadRows(config.path)
    rows = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip(b" \t\r\n"):
                continue
            if config.max_rows is not None and rows == config.max_rows:
                break
            rows += 1
            where = f"line {number}"
            try:
                yield parser.parse(_parse_line(line, first=number == 1), number, where)
            except RowError as error:
                bad.add(where, error)
    bad.raise_if_any()
    if rows:
        parser.check_columns()


def _parse_line(line: bytes, *, first: bool) -> object:
    try:
        text = line.rstrip().decode("utf-8-sig" if first else "utf-8")
        return json.loads(text, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 (byte {error.start} of the line)") from error
    except RecursionError as error:
        raise RowError("nested too deeply") from error
    except json.JSONDecodeError as error:
        raise RowError(f"broken JSON: {error.msg} (column {error.colno})") from error
    except ValueError as error:
        raise RowError(f"broken JSON: {error}") from error


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON value")


# --------------------------------------------------------------------------------- Hugging Face


def read_huggingface(config: HuggingFaceData) -> Iterator[Record]:
    """Rows of a hub data set, of a folder written by `save_to_disk`, or of a local data file."""
    source = Path(config.path).name if Path(config.path).exists() else config.path
    parser = RowParser(config, source)
    bad = BadRows(config.path)
    rows = _load_rows(config)
    count = len(rows) if config.max_rows is None else min(config.max_rows, len(rows))
    for number, row in enumerate(islice(rows, count)):
        where = f"row {number}"
        try:
            yield parser.parse(row, number, where)
        except RowError as error:
            bad.add(where, error)
    bad.raise_if_any()
    if count:
        parser.check_columns()


def _load_rows(config: HuggingFaceData) -> Any:
    path = Path(config.path)
    looks_local = path.is_absolute() or config.path.startswith(".") or path.suffix in FILE_FORMATS
    if looks_local and not path.exists():
        raise ConfigError.at("data.path", config.path, "no such file or folder")
    if path.is_file() and path.suffix not in FILE_FORMATS:
        raise ConfigError.at(
            "data.path", config.path, f"unknown file type; use one of {', '.join(FILE_FORMATS)}"
        )

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
    except (OSError, ValueError, DatasetsError) as error:
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


# -------------------------------------------------------------------------------- reasoning-gym


def generate_reasoning_gym(config: ReasoningGymData, num_eval: int) -> Records:
    """Training and held-out problems from two generation seeds, both derived from data.seed.

    Items of reasoning-gym are seeded by `seed + index`, so seeds next to each other would give
    nearly the same problems; derived ones are far apart.
    """
    check_templates(config)
    name = config.dataset
    held: dict[bytes, Record] = {}
    if num_eval:
        # Small generators repeat themselves: ask for more than needed and keep different ones.
        for record in _generate(config, f"{name}/eval", 20 * num_eval, "held_out"):
            held.setdefault(problem_key(record), record)
            if len(held) == num_eval:
                break
        else:
            raise DataError(
                f"{name}: only {len(held)} different problems in {20 * num_eval} generated ones, "
                f"{num_eval} held-out ones were asked for: lower eval.num_prompts or widen "
                "data.config"
            )
    train, copies = [], []
    for record in _generate(config, name, config.size, "train"):
        if problem_key(record) in held:
            copies.append(record.prompt_id)
        else:
            train.append(record)
    if not train:
        raise DataError(
            f"{name}: all {config.size} training problems equal held-out ones: raise data.size, "
            "lower eval.num_prompts or widen data.config"
        )
    return Records(train, list(held.values()), copies)


def _generate(config: ReasoningGymData, prefix: str, size: int, stream: str) -> Iterator[Record]:
    problems = _create_dataset(config, size, stream)
    for index in range(size):
        entry = problems[index]
        try:
            yield _to_record(config, f"{prefix}/{index}", entry)
        except RowError as error:
            raise DataError(f"{prefix}/{index}: {error}") from error


def _create_dataset(config: ReasoningGymData, size: int, stream: str) -> Any:
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS

    name = config.dataset
    if name not in DATASETS:
        near = _did_you_mean(name, DATASETS)
        raise ConfigError.at("data.dataset", name, f"reasoning-gym has no such data set{near}")
    reserved = {"seed": "data.seed", "size": "data.size"}
    for key in reserved.keys() & config.config.keys():
        raise ConfigError.at(f"data.config.{key}", config.config[key], f"set {reserved[key]}")
    arguments: dict[str, Any] = dict(config.config)
    seed = int.from_bytes(derive_key(config.seed, name, stream)[:4], "little") // 2
    try:
        if name == "composite":
            arguments["datasets"] = [
                DatasetSpec(**({"config": {}} | spec)) for spec in arguments["datasets"]
            ]
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **arguments)
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise ConfigError.at("data.config", config.config, f"{name} refuses it: {error}") from error


def _did_you_mean(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _to_record(config: ReasoningGymData, prompt_id: str, entry: Mapping[str, Any]) -> Record:
    answer = entry["answer"]
    answer = None if answer is None else str(answer)
    text = {
        "answer": answer,
        "solution": entry["metadata"].get("answer_cot"),
        "none": None,
    }[config.demonstrations]
    messages = wrap_prompt(({"role": "user", "content": entry["question"]},), config)
    # A composite's items belong to the data set that wrote them, whose scorer must grade them.
    dataset = entry["metadata"].get("source_dataset", config.dataset)
    record = Record(
        prompt_id=prompt_id,
        messages=with_system_prompt(messages, config),
        answer=answer,
        demonstrations=() if not text else (write_demonstration(text, answer, config),),
        metadata={"reasoning_gym": {"dataset": dataset, "entry": _plain(entry)}},
        origin="reasoning_gym",
    )
    check_encodable(record)
    return record


def _plain(value: Any) -> Any:
    """What JSON can write, as is; the rest (fractions, numpy numbers) as the plain value or text.

    Tuples stay tuples: some scorers compare them.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value.tolist() if hasattr(value, "tolist") else str(value)
