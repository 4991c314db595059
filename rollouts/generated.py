"""Problems that reasoning-gym generates, training and held-out ones from two derived seeds."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from ..engine.errors import ConfigError, DataError
from .config import ReasoningGymRows
from .order import derive_key
from .records import (
    Record,
    Records,
    check_encodable,
    check_templates,
    with_system_prompt,
    wrap_prompt,
    write_demonstration,
)
from .rows import RowError
from .split import problem_key


def generate_problems(config: ReasoningGymRows, num_eval: int, seed: int) -> Records:
    """Training and held-out problems from two generation seeds, both derived from data.seed.

    Items of reasoning-gym are seeded by `seed + index`, so seeds next to each other would give
    nearly the same problems; derived ones are far apart.
    """
    check_templates(config)
    name = config.dataset
    held: dict[int, Record] = {}
    if num_eval:
        # Small generators repeat themselves: ask for more than needed and keep different ones.
        for record in _generate(config, f"{name}/eval", 20 * num_eval, "held_out", seed):
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
    for record in _generate(config, name, config.size, "train", seed):
        if problem_key(record) in held:
            copies.append(record)
        else:
            train.append(record)
    if not train:
        raise DataError(
            f"{name}: all {config.size} training problems equal held-out ones: raise data.size, "
            "lower eval.num_prompts or widen data.config"
        )
    return Records(train, list(held.values()), copies)


def _generate(
    config: ReasoningGymRows, prefix: str, size: int, stream: str, seed: int
) -> Iterator[Record]:
    problems = _create_dataset(config, size, stream, seed)
    for index in range(size):
        entry = problems[index]
        try:
            yield _to_record(config, f"{prefix}/{index}", entry)
        except RowError as error:
            raise DataError(f"{prefix}/{index}: {error}") from error


def _create_dataset(config: ReasoningGymRows, size: int, stream: str, run_seed: int) -> Any:
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
    seed = int.from_bytes(derive_key(run_seed, name, stream)[:4], "little") // 2
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


def _to_record(config: ReasoningGymRows, prompt_id: str, entry: Mapping[str, Any]) -> Record:
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
        metadata={
            "reasoning_gym": {
                "dataset": dataset,
                "config": _scorer_config(config, dataset),
                "entry": _plain(entry),
            }
        },
        origin="reasoning_gym",
    )
    check_encodable(record)
    return record


def _scorer_config(config: ReasoningGymRows, dataset: str) -> Mapping[str, Any]:
    """How the data set that wrote an item was configured: some scorers look at it."""
    if dataset == config.dataset:
        return config.config
    specs = config.config["datasets"]
    return next((spec.get("config", {}) for spec in specs if spec["name"] == dataset), {})


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
