"""What a step learns from, until it is scored: prompts drawn, planned and rolled out, round by round.

With `loop.staleness` 1 the next step is drawn, planned and rolled out while this one trains: `sample_ahead`. With
`loop.extra_prompts` a step takes the first prompts that are complete: `take_first`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

from .config import LoopConfig
from .errors import ConfigError, VersionGone
from .over_sampling import Carried, FirstComplete, generated_tokens
from .run_state import RunState
from .saved_batch import SavedBatch, request_key
from .types import Prompt, Rollout, RolloutGroup, RolloutRequest, StepPlan

if TYPE_CHECKING:
    from .loop import Parts

Round = tuple[Sequence[RolloutRequest], Sequence[RolloutGroup]]
"""What one round of rollouts asked for, and the scored groups."""


@dataclass
class Draws:
    """The training prompts of one step, in the order they were drawn."""

    parts: Parts
    journaled: SavedBatch | None
    prompts: list[Prompt] = field(default_factory=list)
    """Those that earlier steps left come first."""
    left: list[Prompt] = field(default_factory=list)
    """Drawn, and left for later steps."""
    repeated: list[str] = field(default_factory=list)
    """Drawn once more in the same step, and left out."""
    graded: bool = False
    """The verifier was asked about their demonstrations."""

    def draw(self, n: int) -> list[Prompt]:
        """The next n, graded where a loss needs it, less those that are in the step already."""
        seen = {prompt.prompt_id for prompt in [*self.prompts, *self.left]}
        taken = self.parts.data.take(n)
        drawn = graded(self.parts, taken, self.journaled)
        self.graded |= self.journaled is None and drawn is not taken
        fresh = [prompt for prompt in drawn if prompt.prompt_id not in seen]
        self.repeated += [prompt.prompt_id for prompt in drawn if prompt.prompt_id in seen]
        self.prompts += fresh
        return fresh


def graded(
    parts: Parts, prompts: Sequence[Prompt], journaled: SavedBatch | None = None
) -> Sequence[Prompt]:
    """The same prompts, their demonstrations graded where a loss reads scores that the data does not hold."""
    if not any("demonstration_scores" in needs for needs in parts.algorithm.needs.values()):
        return prompts
    known = prompts if journaled is None else journaled.with_verdicts(prompts)
    if all(d.score is not None for prompt in known for d in prompt.demonstrations):
        return known
    with parts.log.phase("grade"):
        return parts.scorer.grade(prompts)


@dataclass
class Planned:
    """A step that is drawn and planned, and perhaps sampled."""

    at: RunState
    """Where the run stands when it is sampled; `at.step`: completed steps before it, what schedules depend on."""
    draws: Draws
    experts: Sequence[Prompt]
    plan: StepPlan
    enough: int | None = None
    """So many prompts are rolled out to the end; None: all."""
    discarded: int = 0
    """Tokens that were sampled in an earlier step and do not fit this one."""
    sampled: Sequence[RolloutGroup] | None = None
    """The first round, where it was rolled out ahead of the step's turn."""

    @property
    def asked(self) -> list[Prompt]:
        return [*self.draws.prompts, *self.experts]


def plan_step(config: LoopConfig, parts: Parts, state: RunState, *, ahead: int = 0) -> Planned:
    """Prompts, prefixes and demonstrations of a step, `ahead` after the next one; sampled by the present weights."""
    at = replace(state, step=state.step + ahead)
    journaled = None if parts.journal is None else parts.journal.recall(at)
    draws = Draws(parts, journaled, list(state.carried.prompts))
    is_last = at.step + 1 >= config.steps
    extra = 0 if is_last else config.extra_prompts
    draws.draw(config.prompts_per_step + extra - len(draws.prompts))
    experts = parts.data.take_experts(parts.algorithm.expert_rows(at.step))
    plan = parts.algorithm.plan(draws.prompts, experts, at.step)
    planned = Planned(at, draws, experts, plan, config.prompts_per_step if extra else None)
    if state.carried.rollouts:
        requests = tuple(state.carried.begin(plan.requests))
        kept = generated_tokens([one for request in requests for one in request.begun])
        planned.discarded = generated_tokens(state.carried.rollouts) - kept
        planned.plan = replace(plan, requests=requests)
    return planned


def take_first(
    parts: Parts, planned: Planned, state: RunState, names: set[str], sampled: Sequence[Rollout]
) -> None:
    """Make the step one of these prompts alone; later ones take the others, with what of `sampled` is theirs."""
    draws, asked = planned.draws, {r.prompt.prompt_id for r in planned.plan.requests}
    draws.left = [p for p in draws.prompts if p.prompt_id in asked - names]
    draws.prompts = [p for p in draws.prompts if p.prompt_id not in asked - names]
    wanted = [request_key(r) for r in planned.plan.requests if r.prompt.prompt_id in names]
    planned.plan = parts.algorithm.plan(draws.prompts, planned.experts, planned.at.step)
    if wanted != [request_key(r) for r in planned.plan.requests]:
        message = "the method asks otherwise for a prompt when others are missing; use 0"
        raise ConfigError.at("loop.extra_prompts", ..., message)
    planned.enough, left = None, {prompt.prompt_id for prompt in draws.left}
    state.carried = Carried(draws.left, [one for one in sampled if one.prompt_id in left])


def waiting_metrics(planned: Planned, state: RunState) -> dict[str, float]:
    """What a step left for later ones, and what it could not use of an earlier one's."""
    return {
        "prompts/waiting": len(state.carried.prompts),
        "rollouts/waiting_tokens": generated_tokens(state.carried.rollouts),
        "rollouts/discarded_tokens": planned.discarded,
    }


def sample_ahead(parts: Parts, planned: Planned, training: Future[Any]) -> None:
    """Roll the first round out while `training` changes the learner's weights; raises what that raises."""
    # A worker that comes up now cannot be given the weights that the others serve.
    parts.rollouts.admit(planned.at.policy_version, (), refuse_weights)
    try:
        planned.sampled = roll_out(parts, planned.plan.requests, (), planned.at.step, training)
    except VersionGone as gone:
        parts.log.console.say(f"step {planned.at.step + 1}: {gone}; it is sampled in its turn")


def refuse_weights(receivers: Sequence[Any]) -> NoReturn:
    raise VersionGone("no rollout worker is left that serves the weights it was begun with")


def rollout_rounds(parts: Parts, planned: Planned, state: RunState) -> list[Round]:
    """The plan's rollouts, then what the algorithm asks for after seeing them, round by round.

    A prompt's rollouts are numbered on over its rounds, so each has a seed of its own. Rounds that are in the journal
    are taken from there; all of them are in it when this returns, and so are verdicts on demonstrations.
    """
    numbered: Counter[str] = Counter()
    rounds: list[Round] = []
    draws, step, ready = planned.draws, planned.at.step, planned.sampled
    known = [] if draws.journaled is None else list(draws.journaled.rounds)
    if planned.enough is None:
        state.carried = Carried()
    elif known:
        names = {group.prompt_id for group in known[0].groups}
        take_first(parts, planned, state, names, state.carried.rollouts)
    requests, sampled = planned.plan.requests, False
    at = planned.at
    while requests:
        requests = [
            replace(r, first_index=r.first_index + numbered[r.prompt.prompt_id]) for r in requests
        ]
        groups = known.pop(0).answer(requests) if known else None
        if groups is None:
            known, sampled = [], True
            if ready is None and not rounds:
                at = state
            first = None if planned.enough is None else FirstComplete(requests, planned.enough)
            groups = ready or roll_out(parts, requests, rounds, step, first=first)
            if first is not None:
                names = {group.prompt.prompt_id for group in groups}
                take_first(parts, planned, state, names, first.left)
                requests = planned.plan.requests
        ready = None
        rounds.append((requests, groups))
        for r in requests:
            end = r.first_index + r.n
            numbered[r.prompt.prompt_id] = max(numbered[r.prompt.prompt_id], end)
        answers = [found for _, found in rounds]
        requests = parts.algorithm.follow_up(answers, step, draws.draw)
    if parts.journal is not None and (sampled or draws.graded):
        with parts.log.phase("journal"):
            parts.journal.write(at, planned.asked, rounds)
    return rounds


def roll_out(
    parts: Parts,
    requests: Sequence[RolloutRequest],
    earlier: Sequence[Round],
    step: int,
    training: Future[Any] | None = None,
    first: FirstComplete | None = None,
) -> Sequence[RolloutGroup]:
    """Sample and score one round, or the prompts that `first` lets through.

    Raises StopAsked where somebody asks the run to stop meanwhile.
    """
    drawn = parts.rollouts.generate(requests, step=step)
    with parts.log.phase("rollout"), parts.stop.breakable(), closing(drawn):
        stream = parts.log.watch(drawn, requests)
        if training is not None:
            stream = while_trains(stream, training)
        before = [group for _, groups in earlier for group in groups]
        if first is None:
            return parts.scorer.score(requests, stream, before)
        found = parts.scorer.score(requests, first.of(stream), before, num_groups=first.enough)
        first.begun = parts.rollouts.interrupt()
        return found


def while_trains(rollouts: Iterable[Rollout], training: Future[Any]) -> Iterator[Rollout]:
    """Pass rollouts through; an update that failed ends the sampling at the next one."""
    for rollout in rollouts:
        if training.done():
            training.result()
        yield rollout
