"""Golden traces of methods with several rounds of rollouts: ghpo, bread and regft."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..algorithms import bread, ghpo, regft
from ..engine.types import (
    Demonstration,
    Prompt,
    Rollout,
    RolloutGroup,
    RolloutRequest,
    Score,
)

Case = Mapping[str, Any]
END = 0


def demonstrated_prompt(demo_length: int, piece_lengths: Sequence[int] = ()) -> Prompt:
    demonstration = Demonstration(
        (*range(1, demo_length), END), text="", piece_lengths=tuple(piece_lengths)
    )
    return Prompt("golden", (), (), demonstrations=(demonstration,))


def roll_out(request: RolloutRequest, rewards: Sequence[float]) -> RolloutGroup:
    """One rollout a reward, whatever number the request asks for."""
    name, prefix = request.prompt.prompt_id, request.prefix
    rollouts = [
        Rollout(name, i, (*prefix, END), len(prefix), (0.0,), 0, "stop", "")
        for i in range(len(rewards))
    ]
    return RolloutGroup(request.prompt, tuple(rollouts), tuple(map(Score.ok, rewards)))


def follow(
    algorithm: Any, prompt: Prompt, step: int, rewards: Callable[[RolloutRequest], Sequence[float]]
) -> list[RolloutRequest]:
    """The requests of one prompt's rounds, the plain one first, as the algorithm's own hooks ask for them."""
    requests = [*algorithm.plan([prompt], [], step).requests]
    rounds: list[list[RolloutGroup]] = []
    while len(rounds) < len(requests):
        rounds.append([roll_out(requests[-1], rewards(requests[-1]))])
        requests += algorithm.follow_up(rounds, step, lambda n: ())
    return requests


def trace_ghpo(algorithm: ghpo.Ghpo, entry: Case) -> dict[str, Any]:
    """The stage at which one prompt's group stays."""
    rewards = entry["rewards_by_stage"]
    seen = iter(rewards)
    prompt = demonstrated_prompt(entry["demo_length"])
    requests = follow(algorithm, prompt, entry["step"], lambda _: next(seen))
    stage = len(requests) - 1
    return {
        "stage": stage,
        "hint_fraction": (0.0, *algorithm.config.hint_fractions)[stage],
        "hint_len": len(requests[-1].prefix),
        "rewards": rewards[stage],
    }


def trace_bread(algorithm: bread.Bread, entry: Case) -> dict[str, Any]:
    """Probes and anchor of one prompt whose demonstration has pieces of one token each."""
    num_pieces = entry["num_pieces"]

    def rewards(request: RolloutRequest) -> list[float]:
        if not request.prefix:
            return entry["rewards"]
        rate = entry["success_by_pieces"][len(request.prefix)]
        return [rate] if rate in (0, 1) else [0.0, 1.0]

    prompt = demonstrated_prompt(num_pieces + 1, [1] * num_pieces)
    _, *more = follow(algorithm, prompt, 0, rewards)
    return {
        "probes": [len(request.prefix) for request in more[:-1]],
        "prefix_pieces": len(more[-1].prefix) if more else 0,
    }


def trace_regft(algorithm: regft.Regft, entry: Case) -> dict[str, Any]:
    """Selection of one problem's candidates."""
    config = algorithm.config
    hard = regft.is_hard(entry["pass_rate"], config)
    return {
        "hard": hard,
        "hint_len": regft.hint_length(entry["demo_length"], config) if hard else 0,
        "kept": regft.keep_candidates(entry["candidate_rewards"], config),
    }


ROUND_TRACES: dict[str, Callable[[Any, Case], dict[str, Any]]] = {
    "ghpo": trace_ghpo,
    "bread": trace_bread,
    "regft": trace_regft,
}
