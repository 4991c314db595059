"""A step of an algorithm without workers: prompts, and the groups that a scorer would return."""

from plait.algorithms import Setup
from plait.engine.types import Demonstration, Prompt, Rollout, RolloutGroup, Sampling, Score

SETUP = Setup(Sampling(12), minibatches=2, epochs=1, seed=3)


def make_prompt(name, demonstrated=True):
    demonstration = Demonstration((4, 5, 6, 7, 8, 9, 2), "x", piece_lengths=(2, 1, 2, 1))
    return Prompt(name, (), (1, 3), demonstrations=(demonstration,) if demonstrated else ())


PROMPTS = [make_prompt(name) for name in "abc"]


def answer(requests, rewards):
    """Groups as the scorer returns them; `rewards` by prompt id, None is UNKNOWN."""
    groups = {}
    for request in requests:
        rollouts = groups.setdefault(request.prompt.prompt_id, (request.prompt, []))[1]
        for index in range(request.first_index, request.first_index + request.n):
            ids = (*request.prefix, 11, 2)
            size = len(request.prefix)
            rollouts.append(
                Rollout(request.prompt.prompt_id, index, ids, size, (-0.1, -0.2), 0, "stop", "")
            )
    return [
        RolloutGroup(
            prompt,
            tuple(rollouts),
            tuple(Score.unknown("?") if r is None else Score.ok(r) for r in rewards[name]),
        )
        for name, (prompt, rollouts) in groups.items()
    ]


def run_rounds(algorithm, prompts, rewards, step=0, fresh=()):
    """All rounds of a step: (requests, groups) of each. `rewards(request)`: one a rollout, None is UNKNOWN."""
    spare = list(fresh)

    def draw(n):
        taken, spare[:] = spare[:n], spare[n:]
        return taken

    requests, rounds = [*algorithm.plan(prompts, [], step).requests], []
    while requests:
        groups = [
            answer([request], {request.prompt.prompt_id: rewards(request)})[0]
            for request in requests
        ]
        rounds.append((requests, groups))
        requests = [*algorithm.follow_up([groups for _, groups in rounds], step, draw)]
    return rounds


def assemble_rounds(algorithm, prompts, rounds, step=0):
    """Updates of a step whose rounds are over."""
    groups = [group for _, groups in rounds for group in groups]
    return algorithm.assemble(algorithm.plan(prompts, [], step), groups, step)
