"""Several rounds of rollouts in one step: numbering, fresh prompts, and who is asked when."""

from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from plait.engine.loop import Parts
from plait.engine.run_state import RunState
from plait.engine.step_rollouts import Draws, Planned, rollout_rounds
from plait.engine.types import (
    Prompt,
    Rollout,
    RolloutGroup,
    RolloutRequest,
    Sampling,
    Score,
    StepPlan,
)
from plait.rewards.groups import ExpectedGroups

SAMPLING = Sampling(max_tokens=4)
PROMPTS = [Prompt(name, (), (5, 6)) for name in "abc"]


class Pool:
    def __init__(self):
        self.asked = []

    def generate(self, requests, *, step):
        self.asked.append(requests)
        for request in requests:
            for index in range(request.first_index, request.first_index + request.n):
                name, prefix = request.prompt.prompt_id, request.prefix
                yield Rollout(name, index, (*prefix, 2), len(prefix), (-1.0,), 0, "stop", "")


class Scorer:
    def score(self, requests, rollouts, earlier=()):
        groups = ExpectedGroups(requests)
        scores = {}
        for rollout in rollouts:
            groups.admit(rollout)
            scores[rollout.prompt_id, rollout.index] = Score.ok(0.0)
        groups.check_complete()
        return groups.grouped(scores)


class Data:
    """Endless a b c a b c."""

    def __init__(self, position=0):
        self.position = position

    def take(self, n):
        taken = [PROMPTS[i % 3] for i in range(self.position, self.position + n)]
        self.position += n
        return taken


def parts(follow_up, data=None) -> Parts:
    log = SimpleNamespace(phase=lambda name: nullcontext(), watch=lambda stream, requests: stream)
    algorithm = SimpleNamespace(follow_up=follow_up, needs={})
    fakes = dict.fromkeys(("learners", "checkpoints", "probes", "tolerance"))
    return Parts(algorithm, data, Pool(), Scorer(), log=log, **fakes)  # type: ignore[arg-type]


def take_rounds(parts, plan, prompts):
    """The groups of each round."""
    state = RunState()
    planned = Planned(state, Draws(parts, None, list(prompts)), (), plan)
    rounds = rollout_rounds(parts, planned, state)
    return [groups for _, groups in rounds]


def plan(*prompts, n=2) -> StepPlan:
    return StepPlan(tuple(RolloutRequest(prompt, n, SAMPLING) for prompt in prompts))


def indices(groups: Sequence[RolloutGroup]) -> list[tuple[str, int]]:
    return [(r.prompt_id, r.index) for group in groups for r in group.rollouts]


def test_rollouts_of_a_prompt_are_numbered_on_over_rounds():
    def follow_up(rounds, step, draw):
        if len(rounds) == 3:
            return ()
        again = RolloutRequest(PROMPTS[0], 1, SAMPLING)
        hinted = RolloutRequest(PROMPTS[0], 2, SAMPLING, prefix=(9,), first_index=1)
        return [again, hinted]

    rounds = take_rounds(parts(follow_up), plan(*PROMPTS[:2]), PROMPTS[:2])
    assert [indices(groups) for groups in rounds] == [
        [("a", 0), ("a", 1), ("b", 0), ("b", 1)],
        [("a", 2), ("a", 3), ("a", 4)],
        [("a", 5), ("a", 6), ("a", 7)],
    ]


def test_fresh_prompts_are_those_that_are_not_in_the_step_yet():
    drawn = []

    def follow_up(rounds, step, draw):
        drawn.append([prompt.prompt_id for prompt in draw(2)])
        return [RolloutRequest(PROMPTS[2], 2, SAMPLING)] if len(drawn) == 1 else ()

    data = Data(position=2)
    take_rounds(parts(follow_up, data), plan(*PROMPTS[:2]), PROMPTS[:2])
    assert drawn == [["c"], []], "a of the next epoch is in the step already"
    assert data.position == 6, "the stream moves by what was asked for"


def test_a_supervised_step_has_no_round_and_is_not_asked():
    def follow_up(rounds, step, draw):
        pytest.fail("no rollouts, nothing to follow up")

    assert take_rounds(parts(follow_up), StepPlan(experts=(PROMPTS[0],)), PROMPTS) == []
