"""The commands that measure and train nothing: a model by `plait eval | probe`, plait itself by `plait bench`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..engine.errors import ConfigError
from .config import load_recipe

Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value ...")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def add_to(app: typer.Typer) -> None:
    app.command("eval")(evaluate)
    app.command()(probe)
    app.command()(bench)


def evaluate(
    target: Annotated[str, typer.Argument(help="A run folder (its export), or a recipe.")],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Write completions and scores here, as JSON lines.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a model on the held-out prompts: a run's export, or the model a recipe names.

    Several answers a prompt give pass@k and maj@k: eval.rollouts_per_prompt=8 eval.temperature=1.
    """
    from .evaluate import evaluate as run
    from .evaluate import show
    from .model import resolve_model
    from .run import load_run

    if Path(target).is_dir():
        model = Path(target) / "export"
        if not model.is_dir():
            raise ConfigError.at("run", target, f"it has no {model}; run `plait export {target}`")
        loaded = load_run(Path(target), overrides or ())
        result = run(loaded, str(model.resolve()), output)
    else:
        recipe = load_recipe(target, overrides or ())
        result = run(recipe, resolve_model(recipe.model.path), output)
    if as_json:
        print(json.dumps(result))
    else:
        show(result)


def probe(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    output: Annotated[
        Path, typer.Option(help="Folder of the table; the same command goes on there.")
    ],
    overrides: Overrides = None,
    rollouts_per_prompt: Annotated[int, typer.Option(min=1, help="Answers of each prompt.")] = 8,
    max_prompts: Annotated[int | None, typer.Option(min=1, help="Default: all of them.")] = None,
    as_json: Json = False,
) -> None:
    """Sort a recipe's training prompts by what its start model can do: solved, learnable, out of reach.

    Says how many groups would carry a signal and how many traces are worth buying, and writes the table that
    data.probe reads.
    """
    from .probe import RATES, Probing
    from .probe import probe as run

    probing = Probing(rollouts_per_prompt, max_prompts)
    say = partial(print, file=sys.stderr) if as_json else print
    report = run(load_recipe(recipe, overrides or ()), probing, output, say)
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        report.show()
        print(output / RATES)


def bench(
    names: Annotated[str, typer.Argument(help="Benchmarks separated by commas, or all.")],
    out: Annotated[
        Path | None, typer.Option(help="Write the table of this page, e.g. docs/benchmarks.md.")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="Only see that the benchmarks work; no figure counts.")
    ] = False,
) -> None:
    """Measure this checkout against its targets: figure, interval, target, met or not. `all` takes up to an hour.

    Exit code 1 where a figure broke a rule of measurement and is void.
    """
    from .bench import bench as run

    page = [] if out is None else ["--out", str(out)]
    raise typer.Exit(run([names, *page, *(["--quick"] * quick)]))
