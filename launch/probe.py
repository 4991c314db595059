"""`plait probe`: what the start model can do on each training prompt, before a token is trained (docs/probe.md).

Prompts are sampled and scored as a run would, without a learner; a killed probe goes on where it was (collect.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.evaluation import SUCCESS
from ..engine.types import RolloutGroup, RolloutRequest
from ..rollouts.probe_table import Rate, parse_rate
from .collect import RowFiles, batches, open_model
from .probe_report import ProbeReport
from .run import check_inputs, load_prompts
from .run_lock import lock_run
from .sampled_settings import PROBE_SETTINGS, Row, probed_settings
from .scoring import open_scorer

if TYPE_CHECKING:
    from ..engine.contracts import Scorer
    from .collect import Sampler
    from .config import Recipe

RATES = "rates.jsonl"


@dataclass(frozen=True)
class Probing:
    """What a person chooses; everything else is the recipe's."""

    rollouts_per_prompt: int = 8
    max_prompts: int | None = None


def probe(
    recipe: Recipe, probing: Probing, folder: Path, say: Callable[[str], None] = print
) -> ProbeReport:
    """Work through the training prompts that `folder` does not hold yet; the report is of the whole folder.

    Raises ConfigError where the folder holds rates of other settings, RunInUse where another process adds to it,
    and what sampling and scoring raise.
    """
    recipe = without_table(recipe)
    inputs = check_inputs(recipe)
    rates: list[Rate] = []

    def note(row: Row) -> None:
        rates.append(parse_rate(row)[1])

    with ExitStack() as stack:
        stack.enter_context(lock_run(folder))
        files = RowFiles(folder, [RATES], PROBE_SETTINGS, settings(recipe, probing), note)
        scorer = open_scorer(recipe, folder)
        stack.callback(scorer.close)
        model, path = stack.enter_context(open_model(recipe, recipe.model.path))
        data = load_prompts(inputs, path)
        model.wait_started(stop_token_ids=[data.end_token_id])
        count, todo = files.left(data, probing.max_prompts)
        say(f"{count} prompts, {count - len(todo)} of them done before")
        for batch in batches(todo):
            n = probing.rollouts_per_prompt
            requests = [RolloutRequest(prompt, n, recipe.sampling) for prompt in batch]
            files.append({RATES: measure(model, scorer, requests)})
            right, scored = sum(r.right for r in rates), sum(r.scored for r in rates)
            say(f"{len(rates)}/{count} prompts: {right} of {scored} scored rollouts right")
    return ProbeReport(rates, probing.rollouts_per_prompt, group_size(recipe))


def measure(model: Sampler, scorer: Scorer, requests: Sequence[RolloutRequest]) -> list[Row]:
    groups = scorer.score(requests, model.generate(requests, step=0))
    return [rate_of(group).to_row(group.prompt.prompt_id) for group in groups]


def rate_of(group: RolloutGroup) -> Rate:
    right = sum(reward >= SUCCESS for reward in group.rewards)
    unknown = len(group.scores) - len(group.rewards)
    return Rate(len(group.rewards), right, unknown, bool(group.prompt.demonstrations))


def group_size(recipe: Recipe) -> int | None:
    """Rollouts that the recipe gives a prompt in a step, the largest of its stages; None for one without rollouts."""
    sections = recipe.algorithm.sections.values()
    sizes = (getattr(section, "rollouts_per_prompt", None) for section in sections)
    return max((size for size in sizes if size is not None), default=None)


def settings(recipe: Recipe, probing: Probing) -> dict[str, Any]:
    """What rates depend on; more prompts may be added later."""
    return {"rollouts_per_prompt": probing.rollouts_per_prompt, **probed_settings(recipe)}


def without_table(recipe: Recipe) -> Recipe:
    """Its own table may be what a recipe is probed for."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"probe": None})})
