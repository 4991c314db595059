"""`plait eval`: score a model on held-out prompts; no learner is started."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.errors import ConfigError
from .placement import reserve
from .run import check_inputs, load_prompts, start_pool
from .scoring import open_scorer

if TYPE_CHECKING:
    from .config import Recipe


def evaluate(recipe: Recipe, model_path: str, output: Path | None = None) -> dict[str, Any]:
    """Greedy (or sampled) accuracy of a model on the recipe's held-out prompts; no learner is started.

    The completions and their scores go into `output`, one JSON object a line.
    """
    if recipe.reward is None or recipe.eval.num_prompts == 0:
        raise ConfigError.at(
            "eval.num_prompts", recipe.eval.num_prompts, "evaluation needs prompts and a reward"
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
