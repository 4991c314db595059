"""The command line. Bad input is one clear message and exit code 2, before anything starts."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from ..engine.errors import ConfigError, DataError, PlaitError, Problem
from .cluster import INSECURE, import_from_here
from .config import load_recipe, read_recipe
from .job import job_id, run_submitted_code, settle
from .job_commands import Insecure, add_to
from .measure_commands import Json, Overrides
from .measure_commands import add_to as add_measures_to

app = typer.Typer(
    name="plait",
    help="Hybrid post-training: expert tokens and verified samples in one run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
check = typer.Typer(no_args_is_help=True, help="Proofs that need no cluster.")
app.add_typer(check, name="check")
add_to(app)
add_measures_to(app)

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")]
RunArgument = Annotated[Path, typer.Argument(help="A run folder, for example runs/quickstart.")]


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing run of this name.")] = False,
    go_on: Annotated[
        bool | None,
        typer.Option(
            "--continue/--no-continue",
            help="Continue an existing run of this name; the default in a Ray job, which may be started again.",
        ),
    ] = None,
    insecure: Insecure = False,
) -> None:
    """Train a recipe."""
    from .run import CONFIG_FILE
    from .run import train as run

    accept_insecure(insecure)
    loaded = settle(load_recipe(recipe, overrides or ()))
    go_on = job_id() is not None and not overwrite if go_on is None else go_on
    resume = go_on and (loaded.folder / CONFIG_FILE).exists()
    named = fields(overrides or ())
    show_summary(run(loaded, overwrite=overwrite, resume=resume, named=named))


@app.command()
def resume(
    run: RunArgument,
    overrides: Overrides = None,
    insecure: Insecure = False,
    verify: Annotated[
        bool,
        typer.Option(
            help="First take the last recorded step again, and compare batch, losses and weights with the record; "
            "exit code 1 where they differ."
        ),
    ] = False,
) -> None:
    """Continue an interrupted run from its last checkpoint.

    A recipe, model, tokenizer or data set that has changed since is refused; a field given here may change:
    plait resume RUN loop.steps=200.
    """
    from .run import load_run
    from .run import train as run_train
    from .run import verify as replay

    accept_insecure(insecure)
    recipe = load_run(run, overrides or ())
    if verify:
        found = replay(recipe)
        print("\n".join(found.lines()))
        if found.differences:
            raise typer.Exit(1)
        if found.steps[-1] >= recipe.loop.steps:
            return  # the run is over
    show_summary(run_train(recipe, resume=True, named=fields(overrides or ())))


@app.command()
def compare(
    recipe: RecipeArgument,
    algorithms: Annotated[
        str,
        typer.Option(help="Methods, separated by commas: algorithm names or labels of --variants."),
    ],
    budget: Annotated[str, typer.Option(help="tokens=N trained tokens, or seconds=S of steps.")],
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Default: runs/compare-RECIPE.")] = None,
    variants: Annotated[
        Path | None, typer.Option(help="YAML: label -> {algorithm: {...}, overrides: [...]}.")
    ] = None,
    keep_models: Annotated[
        bool, typer.Option(help="Keep each run's export and checkpoint.")
    ] = False,
) -> None:
    """Train several methods under one budget from one start; write report.md, report.json, curves.svg.

    Given again, it keeps the finished runs and continues. Exit code 1 when a run failed.
    """
    from .compare import Budget, plan_runs, read_variants, run_all
    from .compare_report import write_report

    base = read_recipe(recipe, overrides or ())
    name = Path(recipe).stem
    folder = output or Path("runs") / f"compare-{name}"
    limit = Budget.parse(budget)
    entries = plan_runs(base, algorithms.split(","), limit, seeds, folder, read_variants(variants))
    outcomes = run_all(entries, print, keep_models)
    command = shlex.join(["plait", *sys.argv[1:]])
    write_report(outcomes, limit, command, name, folder)
    print((folder / "report.md").read_text())
    if any(outcome.failure for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def export(
    run: RunArgument,
    output: Annotated[Path | None, typer.Option(help="Default: RUN/export.")] = None,
    best: Annotated[bool, typer.Option(help="The one with the best evaluation.")] = False,
) -> None:
    """Write a run's latest checkpoint as a Hugging Face model."""
    from .run import export as write
    from .run import load_run

    print(write(load_run(run), output or run / "export", best=best))


@app.command()
def plan(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print what a recipe will do: rows, micro-batches, optimizer steps, tokens, memory."""
    from .architectures import known_architecture, load_architecture
    from .model import resolve_model
    from .plan import make_plan
    from .run import check_inputs

    loaded = load_recipe(recipe, overrides or ())
    unchecked: list[Problem] = []
    check_inputs(loaded, unchecked)
    path = loaded.model.path
    silent = any(problem.path == "model.path" for problem in unchecked)
    architecture = known_architecture(path) if silent else load_architecture(resolve_model(path))
    result = make_plan(loaded, architecture)
    notes = [f"not checked: {problem}" for problem in unchecked]
    if silent:
        notes.append(f"the shape of {path} is the one that plait knows by that name")
    if as_json:
        print(json.dumps({**result.to_json(), "notes": notes}))
    else:
        print("\n".join([*result.lines(), *notes]))


@app.command()
def ask(
    batch: Annotated[
        Path, typer.Argument(help="A run folder (its newest batch), or a batch file.")
    ],
    algorithm: Annotated[str, typer.Option(help="Methods, separated by commas.")],
    recipe: Annotated[str | None, typer.Option(help="Default: the recipe of the run.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Default: the run's export, else the recipe's model.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="Completed steps for schedules; default: the batch's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Loss and gradients by source that each method would produce on one saved minibatch; no cluster."""
    from .ask import ask as compute
    from .ask import find_question, print_answers, to_json

    question = find_question(batch, recipe, model)
    answers = compute(question, algorithm.split(","), step)
    if as_json:
        print(json.dumps(to_json(question, answers)))
    else:
        print_answers(question, answers)


@app.command()
def teach(
    recipe: RecipeArgument,
    output: Annotated[
        Path, typer.Option(help="Folder of the traces; the same command goes on there.")
    ],
    overrides: Overrides = None,
    teacher: Annotated[
        str | None, typer.Option(help="A model, or its name at --endpoint. Default: the recipe's.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="OpenAI-compatible URL, for example http://host:8000/v1.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the endpoint's key.")
    ] = None,
    rollouts_per_prompt: Annotated[int, typer.Option(min=1, help="Answers of each prompt.")] = 4,
    max_kept: Annotated[int, typer.Option(min=1, help="Right answers kept of a prompt.")] = 1,
    hint_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a demonstration shown in a second round.")
    ] = 0.0,
    max_prompts: Annotated[int | None, typer.Option(min=1, help="Default: all of them.")] = None,
) -> None:
    """Sample solutions of the recipe's training prompts from a teacher; keep verified ones as demonstrations."""
    from .teach import DEMONSTRATIONS, Teaching
    from .teach import teach as run

    loaded = load_recipe(recipe, overrides or ())
    teaching = Teaching(
        teacher=teacher or loaded.model.path,
        rollouts_per_prompt=rollouts_per_prompt,
        max_kept=max_kept,
        hint_fraction=hint_fraction,
        max_prompts=max_prompts,
        endpoint=endpoint,
        api_key_env=api_key_env,
    )
    run(loaded, teaching, output)
    print(output / DEMONSTRATIONS)


@app.command()
def model(name: Annotated[str, typer.Argument(help="For example smollm2-135m-instruct.")]) -> None:
    """Make a packaged model a Hugging Face checkpoint in the cache, and print its folder."""
    from .model import resolve_model

    print(resolve_model(name))


@check.command("golden")
def check_golden(
    files: Annotated[list[Path], typer.Argument(help="Files of golden cases.")],
    algorithm: Annotated[str | None, typer.Option(help="Only these, separated by commas.")] = None,
    as_json: Json = False,
) -> None:
    """Recompute reference numbers with the engine's own algorithm code."""
    from .golden import check_file

    chosen = algorithm.split(",") if algorithm else None
    results = [result for file in files for result in check_file(file, chosen)]
    if not results:
        raise ConfigError.at("--algorithm", algorithm, "no case of these algorithms in the files")
    if as_json:
        print(json.dumps([result.to_json() for result in results]))
    else:
        print("\n".join(map(str, results)))
    if not all(result.ok for result in results):
        raise typer.Exit(1)


@check.command("loss")
def check_loss(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    zero: Annotated[str, typer.Option(help="ZeRO stages of the two ranks.")] = "1,2,3",
    as_json: Json = False,
) -> None:
    """Show that a recipe's loss and gradient do not depend on how a minibatch is cut."""
    from .check_loss import check_loss as run
    from .check_loss import parse_stages

    loaded, stages = load_recipe(recipe, overrides or ()), parse_stages(zero)
    with redirect_stdout(sys.stderr):  # DeepSpeed prints on import
        report = run(loaded, stages)
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        print("\n".join(report.lines()))
    if not report.ok:
        raise typer.Exit(1)


@check.command("reward")
def check_reward(
    target: Annotated[str, typer.Argument(help="A recipe; with --replay, a run folder.")],
    overrides: Overrides = None,
    replay: Annotated[
        bool, typer.Option(help="Grade the UNKNOWN scores of a run once more.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Grade gold answers, which must be right, and corrupted ones, which must be wrong.

    Exit code 1 where one is not, or where a replayed score is still UNKNOWN.
    """
    from . import check_reward as checks
    from .run import load_run

    if replay:
        folder = Path(target)
        found = checks.replay(folder, load_run(folder, overrides or ()))
        report, ok = checks.replay_lines(found), all(r.now.reward is not None for r in found)
        details = [r.to_json() for r in found]
    else:
        gold = checks.check_reward(load_recipe(target, overrides or ()))
        report, ok = gold.lines(), gold.passes(0.0)
        details = gold.to_json()
    print(json.dumps({"ok": ok, "details": details}) if as_json else "\n".join(report))
    if not ok:
        raise typer.Exit(1)


@check.command("data")
def check_data(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Append what is dropped or refused, with reasons (JSONL).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Examine every row of a recipe's data and grade every demonstration; start no cluster.

    Exit code 1 where a run would refuse the data (data.admission).
    """
    from .check_data import check_data as run

    found = run(load_recipe(recipe, overrides or ()), output)
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        found.show()
    if not found.ok:
        raise typer.Exit(1)


@check.command("recipe")
def check_recipe(
    recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False
) -> None:
    """Validate a recipe with its model, reward and data; start nothing."""
    from .run import check_inputs

    unchecked: list[Problem] = []
    inputs = check_inputs(load_recipe(recipe, overrides or ()), unchecked)
    counts = {"train": len(inputs.records.train), "held_out": len(inputs.records.held_out)}
    if any(problem.path.startswith("data.") for problem in unchecked):
        counts = {}  # unknown is not 0
    if as_json:
        print(json.dumps({"ok": True, **counts, "unchecked": list(map(str, unchecked))}))
        return
    if counts:
        print(f"ok: {counts['train']} training prompts, {counts['held_out']} held out")
    else:
        print("ok: every section of the recipe is valid; its data was not seen")
    for problem in unchecked:
        print(f"not checked: {problem}")


def accept_insecure(insecure: bool) -> None:
    if insecure:
        os.environ[INSECURE] = "1"


def fields(overrides: Sequence[str]) -> list[str]:
    """What `key.path=value` texts name."""
    return [override.partition("=")[0] for override in overrides]


def show_summary(summary: dict) -> None:
    before, after = summary["eval_before"], summary["eval_after"]
    if before and after:
        print(
            f"accuracy {before['accuracy']:.3f} -> {after['accuracy']:.3f} "
            f"on {after['num_prompts']} held-out prompts"
        )
    proved, tokens = summary["weight_sync"]["proved"], summary["tokens"]
    print(
        f"{summary['steps']} steps, {tokens['policy']} policy and {tokens['expert']} expert tokens, "
        f"{proved} weight syncs proved, {summary['wall_seconds']['total']:.0f} s"
    )


def main() -> None:
    """Entry point: errors that a person can act on are messages, not tracebacks."""
    run_submitted_code()
    import_from_here()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except PlaitError as error:
        name = "" if isinstance(error, ConfigError | DataError) else f"{type(error).__name__}: "
        print(f"error: {name}{error}", file=sys.stderr)
        sys.exit(error.exit_code)
