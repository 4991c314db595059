"""A recipe: YAML plus `key.path=value` overrides -> one frozen object, or every problem at once.

Each folder owns its section; this file composes them, contradictions.py has the checks that concern two sections.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
)

from ..algorithms import AlgorithmBase, AlgorithmConfig, Setup, resolve
from ..engine.config import CheckpointConfig, EvalConfig, LearnerConfig, LoopConfig, Section
from ..engine.errors import ConfigError, Problem
from ..engine.types import Sampling
from ..rewards.config import RewardConfig
from ..rollouts.config import DataConfig, RolloutConfig
from .contradictions import contradictions
from .secret_keys import secrets_in

RECIPES = Path(__file__).parent / "recipes"
Raw = dict[str, Any]
HOSTS = {"data_selection": " here; it needs a host whose expert rows stand alone: sft"}
"""Keys that only some algorithms have, with the place for them."""


class RunConfig(Section):
    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    """Folder of the run below `dir`; absent: the recipe's file name."""
    dir: str = "runs"
    seed: int = 0
    deterministic: bool = False
    """Equal recipes give equal bits, and a resumed run those of an uninterrupted one; slower (docs/reliability.md)."""
    wait_seconds: float = Field(default=300.0, gt=0)
    """How long a run waits for nodes and GPUs before it ends and says what is missing."""


class ModelConfig(Section):
    """`model: PATH` is short for `model: {path: PATH}`."""

    path: str = Field(min_length=1)
    """A local folder, a hub id, or a name that `plait model` knows."""


def short_for(field: str) -> BeforeValidator:
    """A plain string stands for a section with that one field."""
    return BeforeValidator(lambda value: {field: value} if isinstance(value, str) else value)


class Recipe(Section):
    """Everything a run is made of."""

    run: RunConfig
    model: Annotated[ModelConfig, short_for("path")]
    algorithm: SerializeAsAny[AlgorithmConfig]
    data: DataConfig
    reward: Annotated[RewardConfig | None, short_for("function")] = None
    rollouts: RolloutConfig = RolloutConfig()
    learner: LearnerConfig = LearnerConfig()
    loop: LoopConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def folder(self) -> Path:
        return Path(self.run.dir) / self.run.name

    @property
    def evaluates(self) -> bool:
        return self.eval.num_prompts > 0 or bool(self.data.eval_sets)

    @property
    def sampling(self) -> Sampling:
        """How training rollouts are drawn."""
        rollouts = self.rollouts
        return Sampling(rollouts.max_response_length, rollouts.temperature, rollouts.top_p)

    @property
    def samplers(self) -> RolloutConfig:
        """`rollouts` as the workers run: deterministic ones decode one sequence at a time, because kernels round
        differently in batches of another size.
        """
        if not self.run.deterministic:
            return self.rollouts
        return self.rollouts.model_copy(update={"max_num_seqs": 1})

    @property
    def setup(self) -> Setup:
        return Setup(self.sampling, self.loop.minibatches, self.loop.epochs, self.run.seed)

    def build_algorithm(self) -> AlgorithmBase:
        return resolve(self.algorithm.type)(self.algorithm, self.setup)

    def to_yaml(self) -> str:
        """Every field with its value; loads to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file (or one of the shipped recipes, by name) and apply overrides.

    Raises ConfigError with every problem found, each with field path, value and remedy.
    """
    return validate(read_recipe(path, overrides))


def read_recipe(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Raw:
    """The sections as they are written, overrides applied; not yet validated.

    A run without a name has that of the recipe's file.
    """
    if isinstance(recipe, Mapping):
        raw, name = deepcopy(dict(recipe)), {}
    else:
        file = find_recipe(recipe)
        raw, name = read_yaml(file), {"name": file.stem}
    for override in overrides:
        apply_override(raw, override)
    run = raw.setdefault("run", {})
    if isinstance(run, dict):
        raw["run"] = {**name, **run}
    return raw


def find_recipe(path: str | Path) -> Path:
    shipped = RECIPES / f"{path}.yaml"
    for candidate in (Path(path), shipped):
        if candidate.is_file():
            return candidate
    found = (p.relative_to(RECIPES).with_suffix("") for p in RECIPES.rglob("*.yaml"))
    names = ", ".join(sorted(map(str, found)))
    raise ConfigError.at("recipe", str(path), f"no such file, nor a shipped recipe ({names})")


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets the last of two equal keys win in silence; a recipe must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError.at(str(key), ..., f"given twice (line {line}); keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> Raw:
    try:
        raw = yaml.load(file.read_text(), UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError.at("recipe", str(file), f"not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError.at("recipe", str(file), "must be a mapping of sections")
    return raw


def apply_override(raw: Raw, override: str) -> None:
    """`loop.steps=10`: the value is YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError.at("override", override, "must look like key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError.at(key, text, f"not a YAML value: {error}") from error
    *parents, last = key.split(".")
    section = raw
    for parent in parents:
        below: Any = section.setdefault(parent, {})
        if isinstance(below, str) and parent in ("model", "reward"):
            below = section[parent] = {{"model": "path", "reward": "function"}[parent]: below}
        if not isinstance(below, dict):
            raise ConfigError.at(key, value, f"{parent!r} holds a value, not a section")
        section = below
    section[last] = value


def validate(raw: Raw) -> Recipe:
    """Types, ranges and unknown keys of all sections, then what concerns two sections."""
    problems = list(secrets_in(raw))
    if problems:
        raise ConfigError(problems)  # other messages might repeat the values
    schema, raw = recipe_schema(raw, problems)
    try:
        recipe = schema.model_validate(raw)
    except ValidationError as error:
        known = {problem.path for problem in problems}
        found = [as_problem(details, raw, schema) for details in error.errors()]
        problems += [problem for problem in found if problem.path not in known]
        raise ConfigError(problems) from None
    problems += contradictions(recipe)
    if problems:
        raise ConfigError(problems)
    return recipe


def recipe_schema(raw: Raw, problems: list[Problem]) -> tuple[type[Recipe], Raw]:
    """Recipe with `algorithm` typed as the chosen algorithm's own config.

    A response limit that the algorithm section leaves out is the sampler's.
    """
    section = raw.get("algorithm")
    if not isinstance(section, dict) or not isinstance(section.get("type"), str):
        value = section.get("type") if isinstance(section, dict) else section
        problems.append(Problem("algorithm.type", value, "name an algorithm, for example chord"))
        return Recipe, raw
    try:
        config = resolve(section["type"]).Config
    except ConfigError as error:
        problems += error.problems
        return Recipe, {**raw, "algorithm": {"type": section["type"]}}
    rollouts = raw.get("rollouts")
    limit = rollouts.get("max_response_length") if isinstance(rollouts, dict) else None
    limit = RolloutConfig().max_response_length if limit is None else limit
    return recipe_with(config), {**raw, "algorithm": config.with_limit(section, limit)}


@cache
def recipe_with(config: type[AlgorithmConfig]) -> type[Recipe]:
    return create_model("Recipe", __base__=Recipe, algorithm=(config, ...))


def as_problem(details: Any, raw: Raw, schema: type[BaseModel]) -> Problem:
    """One pydantic error as field path, value, remedy."""
    path, section = [], raw
    location = [part for part in details["loc"] if not str(part).startswith("function-")]
    for i, part in enumerate(location):
        absent_key = i == len(location) - 1 and details["type"] in ("missing", "extra_forbidden")
        if isinstance(section, dict | list) and holds(section, part):
            section = section[part]
        elif not absent_key:
            continue  # the tag of a union, not a key
        path.append(str(part))
    name = ".".join(path) or "recipe"
    match details["type"]:
        case "extra_forbidden":
            hint = HOSTS.get(path[-1]) or did_you_mean(path, raw, schema)
            return Problem(name, details["input"], f"unknown key{hint}")
        case "missing":
            return Problem(name, None, "required; add it to the recipe")
        case "value_error":
            return Problem(name, short(details["input"]), str(details["ctx"]["error"]))
        case _:
            return Problem(name, short(details["input"]), details["msg"])


def holds(section: dict[Any, Any] | list[Any], part: Any) -> bool:
    if isinstance(section, list):
        return isinstance(part, int) and part < len(section)
    return part in section


def short(value: Any) -> Any:
    """A whole section as the culprit would bury the message."""
    return ... if isinstance(value, dict) else value


def did_you_mean(path: Sequence[str], raw: Raw, schema: type[BaseModel]) -> str:
    fields = field_names(schema, path[:-1], raw)
    close = difflib.get_close_matches(path[-1], fields, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known here: {', '.join(fields)}" if fields else ""


def field_names(schema: Any, path: Sequence[str], raw: Any) -> list[str]:
    """Fields of the section at `path`; of a union, the member that the section's `type` selects."""
    for part in path:
        if isinstance(raw, list):
            raw = raw[int(part)]
            continue
        raw = raw.get(part) if isinstance(raw, dict) else None
        models = (
            list(section_models(schema.model_fields[part])) if part in schema.model_fields else []
        )
        tagged = [m for m in models if isinstance(raw, dict) and raw.get("type") in m_tags(m)]
        if not models:
            return []
        schema = (tagged or models)[0]
        if schema is AlgorithmConfig and isinstance(raw, dict):
            schema = resolve(raw["type"]).Config
    return list(schema.model_fields)


def section_models(field: Any) -> Sequence[type[BaseModel]]:
    """Models a field's annotation mentions, unions and lists opened."""
    found, open_types = [], [field.annotation]
    while open_types:
        kind = open_types.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.append(kind)
        open_types.extend(getattr(kind, "__args__", ()))
    return found


def m_tags(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("type")
    return getattr(field.annotation, "__args__", ()) if field else ()
