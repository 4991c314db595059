"""One real minibatch of a recipe for every loss of its algorithm, made in process: no Ray, no vLLM.

It takes the same way as in a run (loop.py), with two substitutes: rollouts come from `ModelSampler`, and what would be
the optimizer step is recorded instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..algorithms import AlgorithmBase
from ..algorithms.rows import expert_rows, rollout_rows
from ..algorithms.stages import Stages
from ..engine.checkpoint import Checkpoints
from ..engine.config import LearnerConfig
from ..engine.contracts import LossFn, Need
from ..engine.learner import LearnerWorker, Rank, WeightRoute
from ..engine.learners import InProcessRank, LearnerGroup
from ..engine.loop import Parts, apply_update
from ..engine.metrics import RunLog
from ..engine.run_state import RunState
from ..engine.step_rollouts import Draws, Planned, graded, rollout_rounds
from ..engine.sync_proof import Tolerance
from ..engine.types import (
    Prompt,
    Rollout,
    RolloutGroup,
    RolloutRequest,
    Score,
    TrainBatch,
    Update,
    UpdateReport,
)
from .config import Recipe
from .console import PlainConsole
from .model import resolve_model
from .run import check_inputs, load_prompts
from .scoring import open_scorer

NUM_PROMPTS, ROLLOUTS, MAX_RESPONSE_TOKENS = 2, 4, 16


@dataclass(frozen=True)
class Minibatch:
    """What one optimizer step gets: annotated, finished, prepared; denominators of the whole."""

    loss: str
    batch: TrainBatch
    coefs: Mapping[str, float]


@dataclass(frozen=True)
class Problem:
    """The minibatches, and all that a LearnerWorker needs to compute their gradients."""

    model_path: str
    config: LearnerConfig
    algorithm: AlgorithmBase
    worker: LearnerWorker
    """One rank in this process, with `config`."""
    minibatches: tuple[Minibatch, ...]
    notes: tuple[str, ...]

    @property
    def head(self) -> dict[str, Any]:
        """What the algorithm asks of the LM head, as arguments of a LearnerWorker."""
        return head_of(self.algorithm)

    def learner(
        self, config: LearnerConfig
    ) -> tuple[str, LearnerConfig, Mapping[str, LossFn], Mapping[str, frozenset[Need]]]:
        """The first arguments of a LearnerWorker."""
        return self.model_path, config, self.algorithm.losses, self.algorithm.needs

    def start(self, config: LearnerConfig) -> LearnerWorker:
        """Another single rank in this process."""
        return LearnerWorker(*self.learner(config), Rank(), **self.head)


def head_of(algorithm: AlgorithmBase) -> dict[str, Any]:
    return {
        "token_sampling": algorithm.token_sampling,
        "entropy_top_k": algorithm.entropy_top_k,
    }


class RecordingRank(InProcessRank):
    """Annotates as any rank, but keeps the minibatches of optimizer steps instead of taking them."""

    def __init__(self, worker: LearnerWorker) -> None:
        super().__init__(worker)
        self.recorded: list[Minibatch] = []

    def call(self, method: str, per_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        if method != "step":
            return super().call(method, per_rank)
        micro_batches, loss, coefs, rate, *_ = per_rank[0]
        (batch,) = micro_batches
        self.recorded.append(Minibatch(loss, batch, coefs))
        return [UpdateReport(loss, 0.0, {}, rate)]


class SyntheticScorer:
    """Rewards that show every side of a method: the first prompt's rollouts are right and wrong in turn, the second's
    all wrong, and so on, each with an answer of its own; demonstrations are right."""

    def score(
        self,
        requests: Sequence[RolloutRequest],
        rollouts: Iterable[Rollout],
        earlier: Sequence[RolloutGroup] = (),
    ) -> list[RolloutGroup]:
        prompts = {request.prompt.prompt_id: request.prompt for request in requests}
        arrived = sorted(rollouts, key=lambda rollout: rollout.index)
        groups = []
        for place, (prompt_id, prompt) in enumerate(prompts.items()):
            mine = tuple(r for r in arrived if r.prompt_id == prompt_id)
            right = [place % 2 == 0 and i % 2 == 0 for i in range(len(mine))]
            scores = tuple(Score.ok(float(r), answer=str(i)) for i, r in enumerate(right))
            groups.append(RolloutGroup(prompt, mine, scores))
        return groups

    def grade(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        right = Score.ok(1.0)
        return [
            replace(
                p,
                demonstrations=tuple(replace(d, score=d.score or right) for d in p.demonstrations),
            )
            for p in prompts
        ]

    def close(self) -> None:
        """Nothing is held."""


def make_problem(recipe: Recipe, config: LearnerConfig) -> Problem:
    """Sample, score, assemble and annotate: one minibatch for each loss of the recipe's algorithm.

    Raises ConfigError or DataError as a run would.
    """
    inputs, model_path = check_inputs(recipe), resolve_model(recipe.model.path)
    data = load_prompts(inputs, model_path)
    algorithm = recipe.build_algorithm()
    worker = LearnerWorker(
        model_path, config, algorithm.losses, algorithm.needs, Rank(), **head_of(algorithm)
    )
    sampler = make_sampler(model_path, recipe, data)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        build = Build(shortened(recipe, config), data, worker, sampler, folder)
        found = build.real_or_synthetic()
    minibatches = tuple(found.minibatches.values())
    return Problem(model_path, config, algorithm, worker, minibatches, found.notes)


def shortened(recipe: Recipe, config: LearnerConfig) -> Recipe:
    """The recipe with one small minibatch a step; the algorithm's own section stays as it is."""
    limit = min(MAX_RESPONSE_TOKENS, recipe.rollouts.max_response_length)
    prompts = min(NUM_PROMPTS, recipe.loop.prompts_per_step)
    once = {"prompts_per_step": prompts, "prompts_per_minibatch": None, "epochs": 1}
    return recipe.model_copy(
        update={
            "rollouts": recipe.rollouts.model_copy(update={"max_response_length": limit}),
            "loop": recipe.loop.model_copy(update=once),
            "learner": config,
        }
    )


def make_sampler(model_path: str, recipe: Recipe, data: Any) -> Any:
    """The recipe's model in float32, by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..rollouts.in_process import ModelSampler

    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, attn_implementation="eager", use_safetensors=True
    )
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def decode(token_ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))

    return ModelSampler(model, decode, stop_token_ids=[data.end_token_id], seed=recipe.run.seed)


@dataclass(frozen=True)
class Recording:
    minibatches: Mapping[str, Minibatch]
    """The first of each loss."""
    groups: tuple[RolloutGroup, ...]
    notes: tuple[str, ...]

    def noting(self, note: str) -> Recording:
        return replace(self, notes=(note, *self.notes))


@dataclass(frozen=True)
class Build:
    """Makes the minibatches; `recipe` is the shortened one."""

    recipe: Recipe
    data: Any
    worker: LearnerWorker
    sampler: Any
    folder: Path

    def real_or_synthetic(self) -> Recording:
        """With the recipe's own reward; with synthetic ones where its scores would hide errors."""
        reward = self.recipe.reward
        if reward is None:
            return self.record(None)
        with open_scorer(self.recipe) as scorer:
            found = self.record(scorer)
        lacking = self.lacking(found)
        if lacking is None:
            return found.noting(f"rewards: {reward.function}")
        rule = "right and wrong in turn, all wrong for every second prompt"
        note = f"rewards: synthetic ({rule}), because of {reward.function}: {lacking}"
        return self.record(SyntheticScorer()).noting(note)

    def lacking(self, found: Recording) -> str | None:
        """What the minibatches must have for a wrong divisor to be seen."""
        groups = [group.rewards for group in found.groups]
        if groups and not any(len(set(rewards)) > 1 for rewards in groups):
            return "no two rollouts of a prompt differ in their reward"
        denoms = [minibatch.batch.denom for minibatch in found.minibatches.values()]
        if groups and not any(denom.policy_tokens for denom in denoms):
            return "with its rewards no rollout is trained"
        needs = self.recipe.build_algorithm().needs
        for loss, minibatch in found.minibatches.items():
            if "demonstrations" in needs[loss] and not minibatch.batch.denom.expert_tokens:
                return f"with its rewards no expert token is in {loss}"
        return None

    def record(self, scorer: Any) -> Recording:
        """The first minibatch of each loss."""
        parts, rank = self.parts(scorer)
        algorithm: Any = parts.algorithm
        groups: list[RolloutGroup] = []
        # Most methods use their losses in the first step; stages use others later.
        for step in getattr(algorithm.config, "starts", (0,)):
            groups += self.take_step(parts, step)
        notes = []
        for loss in algorithm.losses.keys() - {minibatch.loss for minibatch in rank.recorded}:
            groups += self.fill_in(parts, loss)
            notes.append(f"{loss}: not used in a first step; made of rollouts and demonstrations")
        recorded = {minibatch.loss: minibatch for minibatch in reversed(rank.recorded)}
        for loss in sorted(recorded):
            denom = recorded[loss].batch.denom
            notes.append(
                f"{loss}: {denom.rows} rows, {denom.policy_tokens} policy and {denom.expert_tokens} expert tokens"
            )
        minibatches = {loss: recorded[loss] for loss in sorted(recorded)}
        return Recording(minibatches, tuple(groups), tuple(notes))

    def parts(self, scorer: Any) -> tuple[Parts, RecordingRank]:
        recipe, algorithm = self.recipe, self.recipe.build_algorithm()
        algorithm.use_prompts(self.data)
        rank = RecordingRank(self.worker)
        learners = LearnerGroup(
            rank,
            self.worker.config.model_copy(update={"share_prefixes": False}),
            algorithm.needs,
            total_steps=recipe.loop.steps,
            seed=recipe.run.seed,
            route=WeightRoute("shared_memory", "float32", recipe.rollouts.sync_timeout_seconds),
        )
        return Parts(
            algorithm=algorithm,
            data=self.data,
            rollouts=self.sampler,
            scorer=scorer,
            learners=learners,
            checkpoints=Checkpoints(self.folder, recipe.checkpoint),
            log=RunLog(self.folder, PlainConsole()),
            probes=(),
            tolerance=Tolerance.for_dtype("float32"),
        ), rank

    def take_step(self, parts: Parts, step: int) -> list[RolloutGroup]:
        """The loop's step up to its updates, which are recorded."""
        algorithm = parts.algorithm
        prompts = self.prompts(parts)
        experts = self.data.take_experts(min(algorithm.expert_rows(step), NUM_PROMPTS))
        plan = algorithm.plan(prompts, experts, step)
        state = RunState(step=step)
        planned = Planned(state, Draws(parts, None, list(prompts)), experts, plan)
        rounds = rollout_rounds(parts, planned, state)
        groups = [group for _, found in rounds for group in found]
        for update in algorithm.assemble(plan, groups, step):
            apply_update(parts, update, step)
        return groups

    def prompts(self, parts: Parts) -> Sequence[Prompt]:
        """Prompts with a demonstration where the algorithm uses any."""
        wanted = any("demonstrations" in needs for needs in parts.algorithm.needs.values())
        num = self.recipe.loop.prompts_per_step
        take = self.data.take_experts if wanted and self.data.num_experts >= num else self.data.take
        return graded(parts, take(num))

    def fill_in(self, parts: Parts, loss: str) -> Sequence[RolloutGroup]:
        """A minibatch for a loss that no first step uses: credited rollouts beside demonstrations."""
        member, step = member_of(parts.algorithm, loss)
        prompts = self.prompts(parts)
        parts.algorithm.plan(prompts, (), step)  # `finish` and `prepare` are the stage's under way
        requests = [RolloutRequest(p, ROLLOUTS, self.recipe.sampling) for p in prompts]
        groups = parts.scorer.score(requests, self.sampler.generate(requests, step=step))
        experts = expert_rows([p for p in prompts if p.demonstrations], self.limit)
        rows = (*member.credit(rollout_rows(groups)), *experts)
        apply_update(parts, Update(rows, loss, member.coefs(0)), step)
        return groups

    @property
    def limit(self) -> int:
        return self.recipe.algorithm.max_response_length


def member_of(algorithm: Any, loss: str) -> tuple[AlgorithmBase, int]:
    """Whose loss it is, and the first step of a stage that has it."""
    if not isinstance(algorithm, Stages):
        return algorithm, 0
    number = int(loss.partition(".")[0])
    return algorithm.members[number], algorithm.config.starts[number]
