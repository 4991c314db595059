"""Recipes with one thing wrong each, made from the fields themselves: misspelt, of a wrong type, out of range, missing,
or in contradiction to another section."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from plait.algorithms import resolve
from plait.engine.config import CheckpointConfig, EvalConfig, LearnerConfig, LoopConfig
from plait.launch.config import RunConfig
from plait.rewards.config import RewardConfig
from plait.rollouts.config import JsonlData, RolloutConfig

SECTIONS: dict[str, type[BaseModel]] = {
    "run": RunConfig,
    "algorithm": resolve("chord").Config,
    "data": JsonlData,
    "reward": RewardConfig,
    "rollouts": RolloutConfig,
    "learner": LearnerConfig,
    "loop": LoopConfig,
    "eval": EvalConfig,
    "checkpoint": CheckpointConfig,
}

CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"loop": {"prompts_per_step": 10, "prompts_per_minibatch": 3}}, "loop.prompts_per_minibatch"),
    ({"learner": {"max_tokens_per_micro_batch": 8}}, "learner.max_tokens_per_micro_batch"),
    ({"rollouts": {"device": "cuda"}}, "rollouts.weight_sync"),
    ({"rollouts": {"weight_sync": "nccl"}}, "rollouts.weight_sync"),
    ({"learner": {"device": "cuda"}}, "learner.device"),
    ({"learner": {"attention": "flash_attention_2"}}, "learner.attention"),
    ({"learner": {"packing": False, "attention": "segments"}}, "learner.attention"),
    ({"learner": {"dtype": "bfloat16"}}, "learner.dtype"),
    ({"learner": {"offload_optimizer": True}}, "learner.offload_optimizer"),
    ({"rollouts": {"weight_sync": "ipc", "tensor_parallel_size": 2}}, "tensor_parallel_size"),
    ({"algorithm": {"max_response_length": 7}}, "algorithm.max_response_length"),
    ({"reward": {"overlong_buffer": 100_000}}, "reward.overlong_buffer"),
    ({"reward": None}, "reward"),
    ({"data": {"filter": {}}}, "data.filter"),
    ({"data": {"type": "parquet"}}, "data"),
    ({"algorithm": {"type": "grpoo"}}, "algorithm.type"),
]


@dataclass(frozen=True)
class Mutation:
    name: str
    recipe: dict[str, Any]
    key: str
    """What the message must name."""


def mutations(right: dict[str, Any], count: int, seed: int = 38) -> list[Mutation]:
    """Every contradiction, and fields drawn at random until there are `count`."""
    found = [broken(right, changes, key) for changes, key in CONTRADICTIONS]
    generated = [m for section in SECTIONS for m in of_section(right, section)]
    random.Random(seed).shuffle(generated)
    return [*found, *generated[: count - len(found)]]


def broken(right: dict[str, Any], changes: dict[str, Any], key: str) -> Mutation:
    recipe = deepcopy(right)
    for section, values in changes.items():
        recipe[section] = values if values is None else {**recipe.get(section, {}), **values}
    return Mutation(f"contradiction: {key}", recipe, key)


def of_section(right: dict[str, Any], section: str) -> Iterator[Mutation]:
    def change(kind: str, key: str, value: Any, named: str | None = None) -> Mutation:
        recipe = deepcopy(right)
        recipe.setdefault(section, {})[key] = value
        return Mutation(f"{kind}: {section}.{key}", recipe, named or f"{section}.{key}")

    for key, field in SECTIONS[section].model_fields.items():
        if key == "type":
            continue
        yield change("misspelt", key[:-1] + key[-1] * 2, 1)
        wrong = wrong_value(field.annotation)
        if wrong is not None:
            yield change("wrong type", key, wrong)
        for bound in field.metadata:
            for name, offset in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0)):
                limit = getattr(bound, name, None)
                if limit is not None:
                    yield change(f"against {name}", key, limit + offset)
        if field.is_required() and key in right.get(section, {}):
            recipe = deepcopy(right)
            del recipe[section][key]
            if (section, key) != ("run", "name"):  # it has the name of the file then
                yield Mutation(f"missing: {section}.{key}", recipe, f"{section}.{key}")


def wrong_value(annotation: Any) -> Any:
    """None where every plain value would do."""
    if annotation in (int, float):
        return "many"
    if annotation is bool:
        return "perhaps"
    if annotation is str:
        return ["a", "list"]
    if get_origin(annotation) is Literal:
        return "something_else"
    if get_origin(annotation) is not None and type(None) in get_args(annotation):
        return wrong_value(next(a for a in get_args(annotation) if a is not type(None)))
    return None
