"""`plait ask`: what each method would make of one saved minibatch, on one model, without a cluster.

Every method gets the same prompts, demonstrations and scored rollouts, makes its own rows of them, and its gradient is
measured at the model's weights and thrown away. A method has its own defaults, the run's own method the run's config;
everything else is the run's recipe. A method that cannot be asked says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from sys import stderr
from typing import Any

from ..algorithms import AlgorithmBase
from ..engine.contracts import LossFn, Need
from ..engine.errors import ConfigError, DataError
from ..engine.ledger import split_by_source
from ..engine.saved_batch import SavedBatch, read_batch
from ..engine.types import Prompt, RolloutGroup, Source, StepPlan, TokenIds, Update
from .config import Recipe, load_recipe, validate
from .model import resolve_model
from .run import CONFIG_FILE, load_run
from .scoring import open_scorer


class Unanswerable(Exception):
    """Why a method cannot be asked about this batch."""


@dataclass(frozen=True)
class Answer:
    """One update of one method; a number that does not exist is None. `reason` is set where there is no answer."""

    algorithm: str
    update: str | None = None
    """The loss of the update; a method may have several a step."""
    loss: float | None = None
    gradient_norm: float | None = None
    expert_gradient_norm: float | None = None
    policy_gradient_norm: float | None = None
    expert_gradient_share: float | None = None
    """expert / (expert + policy) norm."""
    gradient_cosine: float | None = None
    """Between the expert's and the policy's gradient."""
    expert_tokens: int | None = None
    policy_tokens: int | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Question:
    """A batch with what it takes to ask about it."""

    path: Path
    batch: SavedBatch
    recipe: Recipe
    model: str


def find_question(target: Path, recipe: str | None, model: str | None) -> Question:
    """`target`: a run folder (its newest batch), or a batch file; its run's recipe unless another is named."""
    path = newest_batch(target) if target.is_dir() else target
    batch = read_batch(path)
    folder = path.resolve().parent.parent
    if recipe is not None:
        loaded = load_recipe(recipe)
    elif (folder / CONFIG_FILE).is_file():
        loaded = load_run(folder)
    else:
        raise ConfigError.at("--recipe", None, f"{path} lies in no run folder; name a recipe")
    if model is None:
        export = folder / "export"
        model = str(export) if export.is_dir() else loaded.model.path
    return Question(path, batch, loaded, resolve_model(model))


def newest_batch(run: Path) -> Path:
    batches = sorted((run / "batches").glob("step-*.json"))
    if not batches:
        raise ConfigError.at(
            "batch",
            str(run),
            "this run saved none; train with loop.save_batch_every=1, or name a batch file",
        )
    return batches[-1]


def ask(question: Question, names: Sequence[str], step: int | None) -> list[Answer]:
    """One answer for each update of each named method, in that order; `step` replaces the batch's own."""
    batch = question.batch if step is None else replace(question.batch, step=step)
    found: dict[str, tuple[AlgorithmBase, Sequence[Update]] | str] = {}
    for name in dict.fromkeys(names):
        try:
            algorithm = recipe_for(question.recipe, name).build_algorithm()
            if scores_demonstrations(algorithm):
                batch = grade(batch, question.recipe)
            own = name == question.recipe.algorithm.type
            found[name] = algorithm, make_updates(algorithm, batch, own=own)
        except (Unanswerable, ConfigError, DataError) as problem:
            found[name] = " ".join(str(problem).split())
    with redirect_stdout(stderr):  # DeepSpeed logs to stdout, which is for the answers
        measured = measure(
            question, batch.step, {k: v for k, v in found.items() if not isinstance(v, str)}
        )
    answers: list[Answer] = []
    for name, outcome in found.items():
        if isinstance(outcome, str):
            answers.append(Answer(name, reason=outcome))
        else:
            answers += measured[name]
    return answers


def recipe_for(recipe: Recipe, name: str) -> Recipe:
    """The run's recipe with another method, which has its own defaults."""
    if recipe.algorithm.type == name:
        return recipe
    return validate({**recipe.model_dump(mode="json"), "algorithm": {"type": name}})


def scores_demonstrations(algorithm: AlgorithmBase) -> bool:
    return any("demonstration_scores" in needs for needs in algorithm.needs.values())


def grade(batch: SavedBatch, recipe: Recipe) -> SavedBatch:
    """The same batch with a verdict on every demonstration."""
    if all(d.score is not None for prompt in batch.prompts for d in prompt.demonstrations):
        return batch
    if recipe.reward is None:
        raise Unanswerable("it compares demonstrations with rollouts, and the recipe has no reward")
    scorer = open_scorer(recipe)
    try:
        return replace(batch, prompts=tuple(scorer.grade(batch.prompts)))
    finally:
        scorer.close()


@dataclass(frozen=True)
class SavedPrompts:
    """What an algorithm may ask of a saved batch, which holds neither tokenizer nor chat template."""

    by_id: Mapping[str, Prompt]
    vocabulary_size: None = None

    def find(self, prompt_id: str) -> Prompt:
        return self.by_id[prompt_id]

    def is_out_of_reach(self, prompt_id: str) -> bool:
        """Methods are compared on the batch's rollouts, so each prompt has a group."""
        return False

    def show_hint(self, prompt: Prompt, hint: TokenIds) -> Prompt:
        """Hinted prompts would only be rolled out, which ends in Unanswerable: their text does not matter."""
        return prompt

    def empty_prompt(self, prompt: Prompt) -> TokenIds:
        raise Unanswerable("its input hook needs the chat template, which a saved batch lacks")


def make_updates(algorithm: AlgorithmBase, batch: SavedBatch, *, own: bool) -> Sequence[Update]:
    """The step as the method would assemble it; `own`: it asked for the batch's rollouts itself."""
    algorithm.use_prompts(SavedPrompts({prompt.prompt_id: prompt for prompt in batch.prompts}))
    plan = make_plan(algorithm, batch)
    groups = batch.rollout_groups if own and plan.requests else fit_groups(algorithm, batch, plan)
    updates = algorithm.assemble(plan, groups, batch.step)
    trained = [update for update in updates if split_by_source(algorithm, [update])]
    if not trained:
        raise Unanswerable("no row of this batch trains with it")
    return trained


def make_plan(algorithm: AlgorithmBase, batch: SavedBatch) -> StepPlan:
    demonstrated = [prompt for prompt in batch.prompts if prompt.demonstrations]
    if any("demonstrations" in needs for needs in algorithm.needs.values()) and not demonstrated:
        raise Unanswerable("it trains demonstrations, and no prompt of the batch has one")
    rolled_out = {group.prompt_id for group in batch.groups}
    prompts: Sequence[Prompt] = [p for p in batch.prompts if p.prompt_id in rolled_out]
    if algorithm.every_prompt_demonstrated:
        prompts = demonstrated
    experts = demonstrated[: algorithm.expert_rows(batch.step)]
    return algorithm.plan(prompts or batch.prompts, experts, batch.step)


def fit_groups(
    algorithm: AlgorithmBase, batch: SavedBatch, plan: StepPlan
) -> Sequence[RolloutGroup]:
    """The batch's rollouts where they are such as the plan asks for. Raises Unanswerable where they are not."""
    if not plan.requests:
        return ()
    groups = batch.rollout_groups
    if any(request.prefix for request in plan.requests):
        if not any(r.prefix_len for group in groups for r in group.rollouts):
            raise Unanswerable(
                "it forces prefixes of demonstrations before rollouts, and no rollout of the batch starts with one; "
                "ask about a batch of its own run"
            )
        return groups
    own_words = [g for g, saved in zip(groups, batch.groups, strict=True) if saved.asked is None]
    plain = [kept for group in own_words if (kept := without_prefixes(group)).rollouts]
    if not plain:
        raise Unanswerable("it trains plain rollouts, and the batch has none")
    more = algorithm.follow_up([plain], batch.step, lambda n: [])
    if more:
        raise Unanswerable(
            f"having seen these rollouts it asks for {sum(r.n for r in more)} more, of {len(more)} prompts; "
            "ask about a batch of its own run"
        )
    return plain


def without_prefixes(group: RolloutGroup) -> RolloutGroup:
    pairs = zip(group.rollouts, group.scores, strict=True)
    kept = [(rollout, score) for rollout, score in pairs if rollout.prefix_len == 0]
    return replace(
        group, rollouts=tuple(r for r, _ in kept), scores=tuple(score for _, score in kept)
    )


def measure(
    question: Question, step: int, asked: Mapping[str, tuple[AlgorithmBase, Sequence[Update]]]
) -> dict[str, list[Answer]]:
    """Gradients of all methods with one learner in this process; losses are named METHOD.LOSS there."""
    from ..engine.batch import collate
    from ..engine.probes import GradientProbe

    if not asked:
        return {}
    learners = start_learner(question, {name: algorithm for name, (algorithm, _) in asked.items()})
    answers: dict[str, list[Answer]] = {}
    try:
        for name, (algorithm, updates) in asked.items():
            answers[name] = []
            for update in updates:
                single = update.minibatches * update.epochs == 1
                needs = algorithm.needs[update.loss]
                batch = learners.annotate(collate(update.samples), needs, single=single)
                batch = algorithm.finish(batch)
                loss = f"{name}.{update.loss}"
                probes = [
                    GradientProbe(source.name, batch, loss, update.coefs, source)
                    for _, source in split_by_source(algorithm, [update]).values()
                ]
                found = learners.compare_gradients(probes, step=step, prepare=algorithm.prepare)
                answers[name].append(make_answer(name, update, found, batch.denom))
    finally:
        learners.close()
    return answers


def make_answer(name: str, update: Update, found: Any, denom: Any) -> Answer:
    """Numbers of one update from the dot products of its one or two sources."""
    expert, policy = Source.EXPERT.name, Source.POLICY.name
    norms = {source: found.norm(source) for source in found.names}
    both = len(norms) == 2
    return Answer(
        algorithm=name,
        update=update.loss,
        loss=found.metrics[0]["loss"],
        gradient_norm=max(sum(map(sum, found.gram)), 0.0) ** 0.5,
        expert_gradient_norm=norms.get(expert),
        policy_gradient_norm=norms.get(policy),
        expert_gradient_share=found.share(expert, policy) if both else None,
        gradient_cosine=found.cosine(expert, policy) if both else None,
        expert_tokens=denom.expert_tokens,
        policy_tokens=denom.policy_tokens,
    )


def start_learner(question: Question, algorithms: Mapping[str, AlgorithmBase]) -> Any:
    """One rank in this process that knows every loss of every method."""
    from ..engine.learner import LearnerWorker, Rank, WeightRoute
    from ..engine.learners import InProcessRank, LearnerGroup

    def merged(part: Callable[[AlgorithmBase], Mapping[str, Any]]) -> dict[str, Any]:
        return {f"{n}.{loss}": v for n, a in algorithms.items() for loss, v in part(a).items()}

    losses: dict[str, LossFn] = merged(lambda a: a.losses)
    needs: dict[str, frozenset[Need]] = merged(lambda a: a.needs)
    sampling = one_for_all(algorithms, "token_sampling", "draw tokens")
    top_k = one_for_all(algorithms, "entropy_top_k", "measure top-k entropy")
    recipe = question.recipe
    config = recipe.learner.model_copy(update={"num_workers": 1})
    worker = LearnerWorker(
        question.model, config, losses, needs, Rank(), sampling, entropy_top_k=top_k
    )
    route = WeightRoute("shared_memory", config.dtype, config.timeout_seconds)
    steps, seed = recipe.loop.steps, recipe.run.seed
    return LearnerGroup(
        InProcessRank(worker), config, needs, total_steps=steps, seed=seed, route=route
    )


def one_for_all(algorithms: Mapping[str, AlgorithmBase], part: str, verb: str) -> Any:
    """What the methods ask of the learner's head, which works in one way only."""
    found = {getattr(a, part) for a in algorithms.values()} - {None}
    if len(found) > 1:
        raise ConfigError.at(
            "--algorithm",
            ",".join(algorithms),
            f"these {verb} in different ways; ask them one by one",
        )
    return next(iter(found), None)


def to_json(question: Question, answers: Sequence[Answer]) -> dict[str, Any]:
    batch = question.batch
    return {
        "batch": str(question.path),
        "model": question.model,
        "step": batch.step,
        "prompts": len(batch.prompts),
        "rollouts": sum(len(group.rollouts) for group in batch.groups),
        "answers": [asdict(answer) for answer in answers],
    }


def print_answers(question: Question, answers: Sequence[Answer]) -> None:
    from rich.console import Console
    from rich.table import Table

    facts = to_json(question, ())
    console = Console()
    console.print(
        f"{facts['batch']}: step {facts['step']}, {facts['prompts']} prompts, {facts['rollouts']} rollouts; "
        f"model {facts['model']}",
        highlight=False,
    )
    table = Table()
    table.add_column("algorithm")
    table.add_column("update")
    columns = ("loss", "|g|", "|g expert|", "|g policy|", "expert share", "cosine", "tokens e/p")
    for column in columns:
        table.add_column(column, justify="right")
    for answer in answers:
        if answer.reason is None:
            table.add_row(answer.algorithm, answer.update, *cells(answer))
    if table.row_count:
        console.print(table)
    for answer in answers:
        if answer.reason is not None:
            console.print(f"{answer.algorithm}: {answer.reason}", highlight=False, markup=False)


def cells(answer: Answer) -> list[str]:
    numbers = (
        answer.loss,
        answer.gradient_norm,
        answer.expert_gradient_norm,
        answer.policy_gradient_norm,
        answer.expert_gradient_share,
        answer.gradient_cosine,
    )
    shown = ["-" if number is None else f"{number:.4g}" for number in numbers]
    return [*shown, f"{answer.expert_tokens}/{answer.policy_tokens}"]
