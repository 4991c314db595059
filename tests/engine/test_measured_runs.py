"""Whole runs of the loop on the tiny model with scripted rollouts: measuring gradients changes nothing of a run."""

from __future__ import annotations

from contextlib import nullcontext
from math import isfinite
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from plait.algorithms import ALGORITHMS, Setup
from plait.engine import loop
from plait.engine.config import EvalConfig, LearnerConfig, LoopConfig
from plait.engine.learner import LearnerWorker, Rank, WeightRoute
from plait.engine.learners import InProcessRank, LearnerGroup
from plait.engine.run_state import RunState
from plait.engine.saved_batch import read_batch
from plait.engine.types import Demonstration, Prompt, Rollout, Sampling, Score
from plait.rewards.groups import ExpectedGroups

STEPS = 3
SAMPLING = Sampling(max_tokens=6)
CONFIGS: dict[str, dict[str, Any]] = {
    "amft": {
        "warmup_steps": 1,
        "meta_every": 1,
        "validation_prompts": 3,
        "meta_learning_rate": 1.0,
    },
    "chord": {"expert_rows_per_step": 3},
    "prefix_rft": {},
    "relift": {"expert_batch_size": 2},
}


class Stream:
    """Endless prompts with a demonstration each; a position is all of its state."""

    eval_prompts = ()

    def __init__(self):
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def take(self, n):
        self.position += n
        return [self.make(i) for i in range(self.position - n, self.position)]

    take_experts = take

    def observe(self, groups):
        pass

    def metrics(self):
        return {}

    def make(self, i):
        rng = np.random.default_rng(i)
        solution = (*rng.integers(3, 300, 5).tolist(), 2)
        found = (Demonstration(solution, "x", piece_lengths=(2, 3)),)
        return Prompt(f"p{i}", (), (5, 6, int(i % 90) + 7), "x", demonstrations=found)


class Dice:
    """Rollouts and rewards that depend on prompt, index and step alone."""

    def generate(self, requests, *, step):
        for request in requests:
            for index in range(request.first_index, request.first_index + request.n):
                seed = [int(request.prompt.prompt_id[1:]), index, step]
                own = tuple(np.random.default_rng(seed).integers(3, 300, 4).tolist())
                prefix = request.prefix
                ids, logprobs = (*prefix, *own), (-5.7,) * 4
                name = request.prompt.prompt_id
                yield Rollout(name, index, ids, len(prefix), logprobs, 0, "stop", "")

    def score(self, requests, rollouts, earlier=()):
        groups = ExpectedGroups(requests)
        scores = {}
        for rollout in rollouts:
            groups.admit(rollout)
            right = int(rollout.prompt_id[1:]) % 2 and rollout.index % 2
            scores[rollout.prompt_id, rollout.index] = Score.ok(float(right))
        return groups.grouped(scores)

    def receivers(self):
        return ()


class Log:
    def __init__(self, folder):
        self.folder, self.rows = folder, []

    def begin(self, state, steps): ...

    def took(self, name, seconds): ...

    def phase(self, name):
        return nullcontext()

    def watch(self, stream, requests):
        return stream

    def record(self, record): ...

    def step(self, state, groups, metrics):
        self.rows.append({k: v for k, v in metrics.items() if not k.startswith("time/")})


def play(name, model, folder, monkeypatch, **options):
    """Three steps of a method; returns its metrics, final weights and state."""
    cls = ALGORITHMS[name]
    fields = {"rollouts_per_prompt": 2, "max_response_length": 6, **CONFIGS[name]}
    algorithm = cls(cls.Config.model_validate({"type": name, **fields}), Setup(SAMPLING))
    config = LearnerConfig(learning_rate=1e-2)
    worker = LearnerWorker(str(model), config, algorithm.losses, algorithm.needs, Rank())
    route = WeightRoute("shared_memory", "float32", 10.0)
    learners = LearnerGroup(
        InProcessRank(worker), config, algorithm.needs, total_steps=STEPS, seed=0, route=route
    )
    monkeypatch.setattr(learners, "connect", lambda receivers: None)
    monkeypatch.setattr(loop, "publish", lambda parts, state: None)
    checkpoints = SimpleNamespace(
        restore=lambda *a: RunState(), save=lambda *a: None, every=0, pending=False
    )
    dice, log, nothing = Dice(), Log(folder), cast(Any, None)
    parts = loop.Parts(
        algorithm=algorithm,
        data=cast(Any, Stream()),
        rollouts=cast(Any, dice),
        scorer=cast(Any, dice),
        learners=learners,
        checkpoints=cast(Any, checkpoints),
        log=cast(Any, log),
        probes=(),
        tolerance=nothing,
    )
    settings = LoopConfig(steps=STEPS, prompts_per_step=4, prompts_per_minibatch=2, **options)
    loop.train(settings, EvalConfig(num_prompts=0), SAMPLING, parts)
    weights = {n: w.clone() for n, w in worker._full_weights()}
    return log.rows, weights, algorithm.state_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_that_measures_is_the_run_that_does_not(name, tiny_model, tmp_path, monkeypatch):
    plain, weights, state = play(name, tiny_model, tmp_path, monkeypatch)
    rows, same_weights, same_state = play(
        name, tiny_model, tmp_path, monkeypatch, gradient_every=1, save_batch_every=2
    )
    assert state == same_state
    for parameter, weight in weights.items():
        assert torch.equal(weight, same_weights[parameter]), parameter
    for row, measured in zip(plain, rows, strict=True):
        assert row.items() <= measured.items()
        added = measured.keys() - row.keys()
        assert added
        assert all(key.startswith("ledger/") and "gradient" in key for key in added)
        assert all(isfinite(value) for value in measured.values())
    assert any("ledger/gradient_cosine" in row for row in rows)
    assert read_batch(tmp_path / "batches" / "step-000002.json").step == 1


def test_amft_measures_its_meta_gradient_in_the_loop(tiny_model, tmp_path, monkeypatch):
    rows, _, state = play("amft", tiny_model, tmp_path, monkeypatch)
    assert [row["main/mu"] for row in rows[:2]] == [1.0, 0.5]
    assert "algorithm/meta_gradient" not in rows[0]
    for row in rows[1:]:
        assert 0 < abs(row["algorithm/meta_gradient"]) <= 1
        assert row["ledger/demonstrations_unused/validation"] == pytest.approx(3 / 7)
    assert rows[2]["main/mu"] == rows[1]["algorithm/next_mu"] != 0.5
    assert state["mu"] == rows[2]["algorithm/next_mu"]


def test_the_data_sees_what_was_rolled_out(tiny_model, tmp_path, monkeypatch):
    """Once a step, before rows are made of it; what the data says of itself is in the step's metrics."""
    seen = []

    def observe(self, groups):
        seen.append({group.prompt.prompt_id: group.rewards for group in groups})

    monkeypatch.setattr(Stream, "observe", observe)
    monkeypatch.setattr(Stream, "metrics", lambda self: {"data/visited": 4 * len(seen)})
    rows, _, _ = play("prefix_rft", tiny_model, tmp_path, monkeypatch)
    assert [row["data/visited"] for row in rows] == [4, 8, 12]
    assert [list(step) for step in seen] == [[f"p{4 * i + j}" for j in range(4)] for i in range(3)]
    assert seen[0]["p0"] == (0.0, 0.0)
