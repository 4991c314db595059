"""A recipe's `data` section -> `Records`: JSONL files, Hugging Face data sets, reasoning-gym, and mixtures of them.

`read_records(config, num_eval)` is the light half of loading data: it reads, validates and splits,
and needs no tokenizer. A bad row is never skipped silently: all of them are listed at once, or counted.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..engine.errors import ConfigError, DataError
from .bad_rows import BadRows
from .config import (
    DataConfig,
    DrawSection,
    HuggingFaceRows,
    JsonlRows,
    MixtureData,
    ReasoningGymRows,
)
from .eval_sets import add_eval_sets
from .generated import generate_problems
from .huggingface import open_table
from .mixture import mix
from .records import Record, Records, RowParser
from .rows import DUPLICATE, JsonlLines, RowError, Rows
from .split import RecordView, draw_held_out, problem_key, text_key


def read_records(config: DataConfig, num_eval: int = 0) -> Records:
    """Read, validate and split a data set.

    Raises DataError naming file and line (or row) of up to 20 bad rows, or that nothing is left;
    ConfigError where the recipe's `data` section cannot be meant.
    """
    check_hint_template(config)
    if isinstance(config, MixtureData):
        records = mix(config, num_eval, read_part)
    else:
        records = read_part(config, num_eval, config.seed)
    return add_eval_sets(records, config, read_part) if config.eval_sets else records


def check_hint_template(config: DrawSection) -> None:
    template = config.hint_template
    if not {"{prompt}", "{hint}"} <= set(re.findall(r"\{\w+\}", template)):
        raise ConfigError.at("data.hint_template", template, "must contain {prompt} and {hint}")


def read_part(
    config: ReasoningGymRows | JsonlRows | HuggingFaceRows, num_eval: int, seed: int
) -> Records:
    """One data set that is no mixture."""
    if isinstance(config, ReasoningGymRows):
        return generate_problems(config, num_eval, seed)
    rows = open_lines(config) if isinstance(config, JsonlRows) else open_table(config)
    return read_table(rows, config, num_eval, seed)


def open_lines(config: JsonlRows) -> JsonlLines:
    path = Path(config.path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "no such file"
        raise ConfigError.at("data.path", config.path, what)
    return JsonlLines(config.path, config.max_rows)


def read_table(
    rows: Rows, config: JsonlRows | HuggingFaceRows, num_eval: int, seed: int
) -> Records:
    """Go through all rows once, keeping a few numbers of each; records are made again when they are asked for."""
    parser = RowParser(config, rows.name)
    bad = BadRows(rows)
    good, ids, problems = array("q"), array("Q"), array("Q")
    rewards: set[str] = set()
    for index in range(len(rows)):
        try:
            record = parser.parse(rows[index], rows.number(index))
        except RowError as error:
            bad.add(index, error)
            continue
        good.append(index)
        ids.append(text_key(record.prompt_id))
        if num_eval:
            problems.append(problem_key(record))
        if record.reward is not None:
            rewards.add(record.reward)
    numbers, keys = np.array(good), np.array(problems, np.uint64)

    def read(index: int) -> Record:
        return parser.parse(rows[index], rows.number(index))

    first = keep_first(RecordView(read, numbers), np.array(ids, np.uint64), numbers, rows, bad)
    if config.bad_rows == "refuse":
        bad.raise_if_any(config.path)
    if len(rows):
        parser.check_columns()
    if not first.any():
        raise DataError(
            f"{config.path}: the data set is empty"
            if not bad
            else f"{config.path}: all {len(bad)} rows are bad, the first: {next(iter(bad))}"
        )
    numbers, keys = numbers[first], keys[first[: len(keys)]]
    held = draw_held_out(keys, num_eval, seed, config.path)
    copied = np.isin(keys, keys[held]) if held else np.zeros(len(numbers), bool)
    train = RecordView(read, numbers[~copied])
    copied[held] = False
    return Records(
        train,
        RecordView(read, numbers[held]),
        RecordView(read, numbers[copied]),
        bad=(bad,) if bad else (),
        rewards=frozenset(rewards),
    )


def keep_first(
    records: Sequence[Record], keys: np.ndarray, numbers: np.ndarray, rows: Rows, bad: BadRows
) -> np.ndarray:
    """Which records are the first of their id; the others go to `bad`. `keys`: of the ids, which are not held."""
    first = np.ones(len(keys), bool)
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order[1:]] == keys[order[:-1]]) + 1
    known: dict[str, int] = {}
    for place in sorted({*order[again].tolist(), *order[again - 1].tolist()}):
        prompt_id = records[place].prompt_id
        earlier = known.setdefault(prompt_id, place)
        if earlier != place:
            first[place] = False
            where = rows.where(int(numbers[earlier]))
            detail = f"duplicate id {prompt_id!r}, first used by {where}"
            bad.add(int(numbers[place]), RowError(DUPLICATE, detail))
    return first
