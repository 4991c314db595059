"""`plait eval`: score a model on held-out prompts; no learner is started."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.errors import ConfigError
from .console import wide_console
from .placement import reserve
from .run import check_inputs, load_prompts, start_pool
from .scoring import open_scorer

if TYPE_CHECKING:
    from .config import Recipe


def evaluate(recipe: Recipe, model_path: str, output: Path | None = None) -> dict[str, Any]:
    """Greedy (or sampled) accuracy of a model on the recipe's held-out prompts; no learner is started.

    The completions and their scores go into `output`, one JSON object a line.
    """
    if recipe.reward is None or not recipe.evaluates:
        raise ConfigError.at(
            "eval.num_prompts",
            recipe.eval.num_prompts,
            "there is nothing to evaluate on: hold prompts out with it or name data.eval_sets, and give a reward",
        )
    inputs = check_inputs(recipe)

    from ..engine.evaluation import evaluate_groups, evaluation_requests
    from ..engine.metrics import write_rollouts
    from .cluster import ray_cluster

    with ExitStack() as stack:
        scorer = open_scorer(recipe)
        stack.callback(scorer.close)
        stack.enter_context(ray_cluster())
        seats = stack.enter_context(reserve(recipe, learner=False))
        pool = start_pool(recipe, model_path, seats, stack)
        data = load_prompts(inputs, model_path)
        pool.wait_started(stop_token_ids=[data.end_token_id])
        longest = recipe.rollouts.max_response_length
        requests = evaluation_requests(data.eval_prompts, recipe.eval, longest)
        groups = scorer.score(requests, pool.generate(requests, step=0))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_rollouts(output, groups)
    return {"model": model_path, **asdict(evaluate_groups(groups))}


def show(result: Mapping[str, Any]) -> None:
    """A table with a line for all prompts, each set and each difficulty; then where a number comes from few prompts."""
    from rich.box import SIMPLE
    from rich.table import Table

    ks = {name: [k for k in result[f"{name}_at"] if k != "1"] for name in ("pass", "maj")}
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    columns = ["prompts", "scored", "unknown", "accuracy", "95 %"]
    columns += [f"{name}@{k}" for name, mine in ks.items() for k in mine]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    lines = [("all", result), *result["sets"].items()]
    lines += [(f"difficulty {name}", mine) for name, mine in result["difficulties"].items()]
    for name, mine in lines:
        interval = f"{shown(mine['low'])}..{shown(mine['high'])}" if "low" in mine else "-"
        table.add_row(
            name,
            *(str(mine[key]) for key in ("num_prompts", "num_scored", "num_unknown")),
            shown(mine.get("accuracy")),
            interval,
            *(shown(mine.get(f"{n}_at", {}).get(k)) for n, all_k in ks.items() for k in all_k),
        )
    console = wide_console()
    console.print(table)
    if ks["maj"] and result["num_voted"] < result["num_prompts"]:
        console.print(
            f"maj@k is over {result['num_voted']} of {result['num_prompts']} prompts: the others' scores tell no answer"
        )


def shown(number: float | None) -> str:
    return "-" if number is None else f"{number:.3f}"
