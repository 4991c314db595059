"""What a step learns from, until it is scored: prompts drawn, planned and rolled out, round by round.

With `loop.staleness` 1 the next step is drawn, planned and rolled out while this one trains: `sample_ahead`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

from .config import LoopConfig
from .errors import VersionGone
from .run_state import RunState
from .saved_batch import SavedBatch
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
    repeated: list[str] = field(default_factory=list)
    """Drawn once more in the same step, and left out."""
    graded: bool = False
    """The verifier was asked about their demonstrations."""

    def draw(self, n: int) -> list[Prompt]:
        """The next n, graded where a loss needs it, less those that are in the step already."""
        seen = {prompt.prompt_id for prompt in self.prompts}
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
    sampled: Sequence[RolloutGroup] | None = None
    """The first round, where it was rolled out ahead of the step's turn."""

    @property
    def asked(self) -> list[Prompt]:
        return [*self.draws.prompts, *self.experts]


def plan_step(config: LoopConfig, parts: Parts, state: RunState, *, ahead: int = 0) -> Planned:
    """Prompts, prefixes and demonstrations of a step, `ahead` after the next one; sampled by the present weights."""
    at = replace(state, step=state.step + ahead)
    journaled = None if parts.journal is None else parts.journal.recall(at)
    draws = Draws(parts, journaled)
    prompts = draws.draw(config.prompts_per_step)
    experts = parts.data.take_experts(parts.algorithm.expert_rows(at.step))
    plan = parts.algorithm.plan(prompts, experts, at.step)
    return Planned(at, draws, experts, plan)


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
            groups = ready or roll_out(parts, requests, rounds, step)
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
) -> Sequence[RolloutGroup]:
    """Sample and score one round. Raises StopAsked where somebody asks the run to stop meanwhile."""
    drawn = parts.rollouts.generate(requests, step=step)
    with parts.log.phase("rollout"), parts.stop.breakable(), closing(drawn):
        stream = parts.log.watch(drawn, requests)
        if training is not None:
            stream = while_trains(stream, training)
        return parts.scorer.score(requests, stream, [g for _, groups in earlier for g in groups])


def while_trains(rollouts: Iterable[Rollout], training: Future[Any]) -> Iterator[Rollout]:
    """Pass rollouts through; an update that failed ends the sampling at the next one."""
    for rollout in rollouts:
        if training.done():
            training.result()
        yield rollout
