"""`plait compare`: several methods from one start under one budget, with several seeds; one report.

Every run is an ordinary run folder below OUTPUT/runs. A finished one is kept: the same command, given again, continues
where it was interrupted. Rollout workers stay up between runs and get each run's initial weights at its beginning.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError

from ..algorithms import resolve
from ..engine.checkpoint import Checkpoints
from ..engine.config import Section
from ..engine.errors import ConfigError, PlaitError, Problem, RunInUse, Stopped
from .cluster import ray_cluster
from .config import Raw, Recipe, apply_override, read_yaml, validate
from .open_pool import OpenPool
from .run import CONFIG_FILE, SUMMARY_FILE, check_inputs, train

BUDGETS = {"tokens": "max_trained_tokens", "seconds": "max_seconds"}
SHARED_FIELDS = ("rollouts_per_prompt", "sampler_ratio_cap", "max_response_length")
"""Fields of the recipe's algorithm section that every method given by name takes over, where it has them."""


class Variant(Section):
    """An entry of a variants file: the method, and what else of the recipe differs."""

    algorithm: dict[str, Any]
    overrides: list[str] = Field(default_factory=list)
    """key.path=value"""


@dataclass(frozen=True)
class Budget:
    kind: str
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`tokens=200000` or `seconds=600`. Raises ConfigError at --budget."""
        kind, _, amount = text.partition("=")
        wrong = ConfigError.at("--budget", text, "must be tokens=N or seconds=S, above 0")
        if kind not in BUDGETS:
            raise wrong
        try:
            number = float(amount.replace("_", ""))
        except ValueError as error:
            raise wrong from error
        if not number > 0 or (kind == "tokens" and number != int(number)):
            raise wrong
        return cls(kind, number)

    def __str__(self) -> str:
        noun = "trained tokens" if self.kind == "tokens" else "seconds of steps"
        return f"{self.amount:,.0f} {noun}"

    @property
    def override(self) -> str:
        number = int(self.amount) if self.kind == "tokens" else self.amount
        return f"loop.{BUDGETS[self.kind]}={number}"


@dataclass(frozen=True)
class Entry:
    """One run of the comparison."""

    label: str
    seed: int
    recipe: Recipe


@dataclass(frozen=True)
class Outcome:
    """A finished run's summary, or why there is none."""

    entry: Entry
    summary: Mapping[str, Any] | None
    failure: str = ""


def plan_runs(
    base: Raw,
    labels: Sequence[str],
    budget: Budget,
    seeds: int,
    output: Path,
    variants: Mapping[str, Variant],
) -> list[Entry]:
    """Every run of the comparison as a recipe, seed by seed, so that what is done first can be compared.

    Raises ConfigError with the problems of all methods, each at its label.
    """
    if not labels or len(set(labels)) < len(labels):
        raise ConfigError.at("--algorithms", ",".join(labels), "name each method once")
    unused = sorted(variants.keys() - set(labels))
    if unused:
        raise ConfigError.at(
            "--variants", ", ".join(unused), "not in --algorithms; name it there, or remove it"
        )
    entries: list[Entry] = []
    problems: list[Problem] = []
    for i in range(seeds):
        for label in labels if not problems else ():
            try:
                entries.append(plan_run(base, label, variants.get(label), budget, i, output))
            except ConfigError as error:
                problems += [replace(p, path=f"{label}: {p.path}") for p in error.problems]
    if problems:
        raise ConfigError(problems)
    return entries


def plan_run(
    base: Raw, label: str, variant: Variant | None, budget: Budget, number: int, output: Path
) -> Entry:
    """The recipe with the method of `label`, run and data seeds moved on by `number`, the budget as its limit."""
    raw = copy.deepcopy(base)
    if variant is not None:
        raw["algorithm"] = dict(variant.algorithm)
        for override in variant.overrides:
            apply_override(raw, override)
    else:
        raw["algorithm"] = named_section(label, raw.get("algorithm"))
    for section in ("run", "data"):
        values = raw.get(section)
        if isinstance(values, dict) and isinstance(values.get("seed", 0), int):
            values["seed"] = values.get("seed", 0) + number
    apply_override(raw, budget.override)
    apply_override(raw, f"run.dir={output / 'runs'}")
    apply_override(raw, f"run.name={label.replace(':', '.')}-{number}")
    recipe = validate(raw)
    if recipe.reward is None or not recipe.evaluates:
        raise ConfigError.at(
            "eval.num_prompts",
            recipe.eval.num_prompts,
            "a comparison needs held-out prompts and a reward",
        )
    return Entry(label, recipe.run.seed, recipe)


def named_section(label: str, own: Any) -> Raw:
    """The recipe's own section where it is that algorithm's; else the algorithm's defaults and SHARED_FIELDS."""
    own = own if isinstance(own, dict) else {}
    if own.get("type") == label:
        return own
    fields = resolve(label).Config.model_fields
    return {"type": label} | {k: own[k] for k in SHARED_FIELDS if k in own and k in fields}


def read_variants(file: Path | None) -> dict[str, Variant]:
    """`label: {algorithm: {...}, overrides: [key.path=value, ...]}` for methods that a name does not say all of."""
    if file is None:
        return {}
    if not file.is_file():
        raise ConfigError.at("--variants", str(file), "no such file")
    try:
        return TypeAdapter(dict[str, Variant]).validate_python(read_yaml(file))
    except ValidationError as error:
        raise ConfigError(
            [
                Problem(f"--variants {file}: {'.'.join(map(str, e['loc']))}", e["input"], e["msg"])
                for e in error.errors()
            ]
        ) from error


def run_all(
    entries: Sequence[Entry], say: Callable[[str], None], keep_models: bool = False
) -> list[Outcome]:
    """Train what is not finished yet. A run that fails is an outcome too; the others go on.

    Raises ConfigError or DataError, before anything starts, for what can be refused; ConfigError where OUTPUT holds
    the run of another recipe.
    """
    for entry in entries:
        check_same(entry.recipe)
    for recipe in {entry.label: entry.recipe for entry in entries}.values():
        check_inputs(recipe)
    workers = OpenPool()
    outcomes = []
    with ExitStack() as stack:
        stack.enter_context(ray_cluster())
        stack.callback(workers.close)
        for i, entry in enumerate(entries, start=1):
            say(f"run {i} of {len(entries)}: {entry.label}, seed {entry.seed}")
            outcomes.append(run_one(entry, workers, keep_models))
            if outcomes[-1].failure:
                say(f"failed: {outcomes[-1].failure}")
    return outcomes


def run_one(entry: Entry, workers: OpenPool, keep_models: bool) -> Outcome:
    """Skip, continue or start a run, whichever its folder says."""
    from ray.exceptions import RayError

    recipe = entry.recipe
    folder = recipe.folder
    summary = finished(folder)
    if summary is None:
        resume = bool(Checkpoints(folder / "checkpoints", recipe.checkpoint).complete())
        try:
            summary = train(recipe, overwrite=not resume, resume=resume, workers=workers)
        except (Stopped, RunInUse):
            raise  # says nothing of the method: given again, the comparison goes on
        except (PlaitError, RayError, RuntimeError) as error:
            workers.close()
            lines = str(error).strip().splitlines() or ["no message"]
            return Outcome(entry, None, f"{type(error).__name__}: {lines[0]}")
    if not keep_models:
        for name in ("checkpoints", "export"):
            shutil.rmtree(folder / name, ignore_errors=True)
    return Outcome(entry, summary)


def finished(folder: Path) -> Mapping[str, Any] | None:
    file = folder / SUMMARY_FILE
    return json.loads(file.read_text()) if file.is_file() else None


def check_same(recipe: Recipe) -> None:
    """A run that is there already must be one of this very recipe."""
    written = recipe.folder / CONFIG_FILE
    if written.is_file() and written.read_text() != recipe.to_yaml():
        raise ConfigError.at(
            "--output",
            str(recipe.folder),
            "holds a run of another recipe, budget or plait version; choose another folder, or remove it",
        )
