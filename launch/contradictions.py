"""What two sections of a recipe say against each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..algorithms import AlgorithmBase, AlgorithmConfig, resolve
from ..algorithms.stages import StagesConfig
from ..engine.errors import Problem
from .sampled_settings import unread_table

if TYPE_CHECKING:
    from .config import Recipe


def contradictions(recipe: Recipe) -> list[Problem]:
    """What two sections say against each other; each message names both keys."""
    problems = []

    def check(ok: bool, path: str, value: object, message: str) -> None:
        if not ok:
            problems.append(Problem(path, value, message))

    rollouts, learner, algorithm = recipe.rollouts, recipe.learner, recipe.algorithm
    longest = rollouts.max_prompt_length + rollouts.max_response_length
    budget = learner.max_tokens_per_micro_batch
    check(
        longest <= budget,
        "learner.max_tokens_per_micro_batch",
        budget,
        f"a row may have rollouts.max_prompt_length + rollouts.max_response_length = {longest} tokens; "
        "raise it, or lower those limits",
    )
    check(
        algorithm.max_response_length == rollouts.max_response_length,
        "algorithm.max_response_length",
        algorithm.max_response_length,
        f"must equal rollouts.max_response_length = {rollouts.max_response_length}; leave it out",
    )
    on_cpu = rollouts.device == "cpu"
    check(
        (rollouts.weight_sync == "shared_memory") == on_cpu,
        "rollouts.weight_sync",
        rollouts.weight_sync,
        f"does not work with rollouts.device = {rollouts.device}; "
        "use shared_memory on cpu, nccl or ipc on cuda",
    )
    check(
        learner.device == rollouts.device,
        "learner.device",
        learner.device,
        f"must equal rollouts.device = {rollouts.device}: weights do not travel between kinds of device",
    )
    check(
        learner.device == "cuda" or learner.attention != "flash_attention_2",
        "learner.attention",
        learner.attention,
        "needs learner.device = cuda",
    )
    check(
        learner.packing or learner.attention == "auto",
        "learner.attention",
        learner.attention,
        "is chosen for packed rows, but learner.packing is false; leave one of them out",
    )
    check(
        recipe.reward is not None or not needs_reward(recipe),
        "reward",
        None,
        "required: rollouts and evaluation are scored; name one, for example math, "
        "or set eval.num_prompts = 0 for supervised training without evaluation",
    )
    observing = recipe.data.observing
    check(
        observing is None or any(map(samples_rollouts, algorithm.sections.values())),
        f"data.{observing}",
        ...,
        f"chooses prompts by how their rollouts went, and algorithm.type = {algorithm.type!r} has none; leave it out",
    )
    if isinstance(algorithm, StagesConfig):
        begins, steps = algorithm.starts[-1], recipe.loop.steps
        check(
            begins < steps,
            "algorithm.stages",
            ...,
            f"the last one would begin after {begins} steps, loop.steps = {steps} never gets there; raise loop.steps, "
            "or shorten the stages before it",
        )
    check(
        recipe.loop.max_seconds is None or not recipe.run.deterministic,
        "loop.max_seconds",
        recipe.loop.max_seconds,
        "ends a run at a time that no clock repeats, and run.deterministic is true; use max_trained_tokens or steps",
    )
    buffer = recipe.reward.overlong_buffer if recipe.reward else None
    check(
        buffer is None or buffer <= rollouts.max_response_length,
        "reward.overlong_buffer",
        buffer,
        f"must be at most rollouts.max_response_length = {rollouts.max_response_length}",
    )
    segments = not learner.packing or learner.attention == "segments" or on_cpu
    for section, config in algorithm.sections.items():
        hook = getattr(getattr(config, "expert_loss", None), "input_hook", None)
        check(
            segments or not getattr(hook, "hide_from_attention", False),
            f"{section}.expert_loss.input_hook.hide_from_attention",
            True,
            "flash-attention cannot hide tokens; set learner.attention = segments",
        )
    return [
        *problems,
        *unfed_expert_loss(recipe),
        *unread_table(recipe),
        *unfit_for_staleness(recipe),
    ]


def unfed_expert_loss(recipe: Recipe) -> list[Problem]:
    """An expert loss whose needs or schedule the algorithm (one from outside, perhaps) does not pass on."""
    return [
        problem
        for section, config in recipe.algorithm.sections.items()
        for problem in unfed_by(section, resolve(config.type)(config, recipe.setup))
    ]


def unfed_by(section: str, algorithm: AlgorithmBase) -> list[Problem]:
    loss = algorithm.expert_loss
    if loss is None:
        return []
    fed = frozenset[str]().union(*algorithm.needs.values())
    unfed = sorted(loss.needs - fed) + sorted(loss.coefs(0).keys() - algorithm.coefs(0).keys())
    if not unfed:
        return []
    message = (
        f"needs {', '.join(unfed)}, which {algorithm.config.type} does not feed it; its `needs` must take in "
        "`expert_loss.needs`, its `coefs` those of AlgorithmBase"
    )
    return [Problem(f"{section}.expert_loss.type", loss.kind, message)]


def unfit_for_staleness(recipe: Recipe) -> list[Problem]:
    """A method that cannot plan ahead, or would take rollouts of older weights for those of the present ones."""
    loop = recipe.loop
    field = "extra_prompts" if loop.extra_prompts else "staleness"
    path, value = f"loop.{field}", getattr(loop, field)
    if not value:
        return []
    if loop.extra_prompts and recipe.run.deterministic:
        message = "takes what is complete first, which no run repeats, and run.deterministic is true; use 0"
        return [Problem(path, value, message)]
    algorithm, kind = recipe.build_algorithm(), recipe.algorithm.type
    if not algorithm.plans_ahead:
        message = f"{kind} plans a step by what became of the one before; use 0"
        return [Problem(path, value, message)]
    reads_ratio = any("old_logprobs" in needs for needs in algorithm.needs.values())
    if reads_ratio and getattr(recipe.algorithm, "sampler_ratio_cap", None) is None:
        message = "nothing corrects for rollouts of older weights; set algorithm.sampler_ratio_cap, for example 2.0"
        if not hasattr(recipe.algorithm, "sampler_ratio_cap"):
            message = f"{kind} has no correction for rollouts of older weights; use 0"
        return [Problem(path, value, message)]
    return []


def needs_reward(recipe: Recipe) -> bool:
    return recipe.evaluates or any(map(samples_rollouts, recipe.algorithm.sections.values()))


def samples_rollouts(config: AlgorithmConfig) -> bool:
    """Rollouts of its own, or those that its data selection judges demonstrations by."""
    selection = getattr(config, "data_selection", None)
    judges = selection is not None and selection.num_rollouts > 0
    return judges or hasattr(config, "rollouts_per_prompt")
