"""Samples that are interrupted and go on, on real vLLM: no token is lost, and none is drawn by other weights."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from plait.engine.types import Prompt, Rollout, RolloutRequest, Sampling
from plait.engine.weight_sync import SharedMemorySender
from plait.rollouts.pool import Pool
from weight_sync.served_model import CONFIG, LocalLearner, write_model

LENGTH = 120
NUM_PROMPTS, N = 6, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), "llama", tied=True)


@pytest.fixture
def pool(ray_session, model: str) -> Iterator[Pool]:
    changes = {"num_workers": 2, "max_response_length": LENGTH, "max_num_seqs": 4}
    opened = Pool(model, CONFIG.model_copy(update=changes), dtype="float32", seed=11)
    opened.wait_started()
    yield opened
    opened.close()


def requests() -> list[RolloutRequest]:
    prompts = [Prompt(f"p/{i}", (), tuple(range(i + 3, i + 13))) for i in range(NUM_PROMPTS)]
    return [RolloutRequest(prompt, N, Sampling(LENGTH)) for prompt in prompts]


def going_on(asked: list[RolloutRequest], sampled: list[Rollout]) -> list[RolloutRequest]:
    return [
        replace(r, begun=tuple(one for one in sampled if one.prompt_id == r.prompt.prompt_id))
        for r in asked
    ]


def interrupted(
    pool: Pool, asked: list[RolloutRequest], after: int
) -> tuple[list[Rollout], list[Rollout]]:
    """(those that came, those that were left) once `after` samples have come."""
    stream = pool.generate(asked, step=0)
    came = [next(stream) for _ in range(after)]
    left = pool.interrupt()
    assert list(stream) == []
    return came, left


def test_every_token_has_the_log_prob_of_what_stands_before_it(pool: Pool, model: str) -> None:
    """Interrupted again and again, until all are there: none is lost, none is there twice."""
    asked, done, begun, times = requests(), {}, [], 0
    while len(done) < NUM_PROMPTS * N:
        came, left = interrupted(pool, going_on(asked, [*done.values(), *begun]), len(done) + 1)
        ended = [rollout for rollout in [*came, *left] if rollout.finish_reason != "abort"]
        assert not done.keys() - {(r.prompt_id, r.index) for r in ended}
        done |= {(r.prompt_id, r.index): r for r in ended}
        begun = [rollout for rollout in left if rollout.finish_reason == "abort"]
        assert all(0 < len(r.token_ids) == len(r.logprobs) < LENGTH for r in begun)
        times += bool(begun)
    assert times > 2
    assert {member["owes"] for member in pool.status()} == {0}
    learner = LocalLearner(model)
    prompts = {r.prompt.prompt_id: r.prompt.token_ids for r in asked}
    for rollout in done.values():
        (expected,) = learner.logprobs([(*prompts[rollout.prompt_id], *rollout.token_ids)])
        assert rollout.logprobs == pytest.approx(expected[-len(rollout.token_ids) :], abs=1e-4)
        is_long = len(rollout.token_ids) == LENGTH
        assert rollout.finish_reason == ("length" if is_long else "stop")


def test_the_rest_is_drawn_by_the_weights_that_came_in_between(pool: Pool, model: str) -> None:
    """The sync finds every worker at rest; each token has the log-prob of the weights that drew it."""
    learner, receivers = LocalLearner(model), pool.receivers()
    sender = SharedMemorySender(rank=0, dtype=torch.float32, timeout_seconds=120)
    asked = requests()
    try:
        sender.connect(receivers)
        sender.send(learner.weights, 1)
        pool.admit(1, receivers, sender.connect)
        came, left = interrupted(pool, asked, 1)
        begun = {(r.prompt_id, r.index): r for r in left if r.finish_reason == "abort"}
        assert begun
        learner.step(seed=0)
        sender.send(learner.weights, 2)
        pool.admit(2, receivers, sender.connect)
        done = list(pool.generate(going_on(asked, [*came, *left]), step=1))
    finally:
        sender.close()
    assert len(done) == NUM_PROMPTS * N
    prompts = {r.prompt.prompt_id: r.prompt.token_ids for r in asked}
    for rollout in done:
        first = begun.get((rollout.prompt_id, rollout.index))
        if first is None:
            continue
        known = len(first.token_ids)
        assert rollout.policy_version == 1
        assert rollout.token_ids[:known] == first.token_ids
        assert rollout.logprobs[:known] == first.logprobs
        (expected,) = learner.logprobs([(*prompts[rollout.prompt_id], *rollout.token_ids)])
        rest = len(rollout.token_ids) - known
        assert rest > 0
        assert rollout.logprobs[known:] == pytest.approx(expected[-rest:], abs=1e-4)


def test_a_worker_that_dies_takes_only_its_own_samples_along(pool: Pool) -> None:
    stream = pool.generate(requests(), step=0)
    next(stream)
    time.sleep(0.1)
    victim = pool._crew.up()[0]
    assert victim.place is not None
    os.kill(victim.place.pid, signal.SIGKILL)
    left = pool.interrupt()
    assert list(stream) == []
    assert len({(r.prompt_id, r.index) for r in left}) == len(left) < NUM_PROMPTS * N
    again = list(pool.generate(going_on(requests(), left), step=1))
    assert len({(r.prompt_id, r.index) for r in again}) == NUM_PROMPTS * N
