"""Statistics that depend on the current weights are those of the whole minibatch, however it is packed."""

import json
from dataclasses import replace

import pytest
import torch
from rows import make_rows

from plait.algorithms import Setup
from plait.algorithms.sft import Sft, SftConfig
from plait.engine.batch import collate
from plait.engine.config import LearnerConfig
from plait.engine.learner import LearnerWorker, Rank, WeightRoute
from plait.engine.learners import InProcessRank, LearnerGroup
from plait.engine.types import Sampling, Update


def make_learners(model, algorithm, max_tokens):
    config = LearnerConfig(max_tokens_per_micro_batch=max_tokens, learning_rate=1e-2)
    worker = LearnerWorker(str(model), config, algorithm.losses, algorithm.needs, Rank())
    route = WeightRoute("shared_memory", "float32", 60.0)
    return LearnerGroup(
        InProcessRank(worker), config, algorithm.needs, total_steps=4, seed=0, route=route
    )


def one_step(model, algorithm, max_tokens):
    group = make_learners(model, algorithm, max_tokens)
    torch.manual_seed(0)
    rows = make_rows("eeee")
    update = Update(tuple(rows), "main", {})
    batch = algorithm.finish(collate(rows))
    (report,) = group.update(batch, update, step=0, prepare=algorithm.prepare)
    return report


@pytest.mark.parametrize(
    "loss",
    [
        {"type": "talr"},
        {"type": "talr", "normalization": "simplex"},
        # The tiny model's probabilities are near 1 / vocabulary.
        {"type": "prob_family", "keep_probability_above": 0.0033},
    ],
)
def test_packing_does_not_change_them(tiny_model, loss):
    algorithm = Sft(SftConfig.model_validate({"expert_loss": loss}), Setup(Sampling(16)))
    longest = max(len(row) for row in make_rows("eeee"))
    whole = one_step(tiny_model, algorithm, 4096)
    parts = one_step(tiny_model, algorithm, longest)
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-5, abs=1e-7)
    if loss["type"] == "prob_family":
        assert 0 < whole.metrics["expert_kept_fraction"] < 1
    else:
        assert whole.metrics["expert_temperature"] > 1


def test_glow_remembers_each_row_as_it_was_before_the_update(tiny_model):
    algorithm = Sft(
        SftConfig.model_validate({"expert_loss": {"type": "glow", "gain_sharpness": 1.0}}),
        Setup(Sampling(16)),
    )
    rows = [replace(row, sample_id=f"row{i}") for i, row in enumerate(make_rows("eeee"))]
    update, batch = Update(tuple(rows), "main", {}, minibatches=2, epochs=2), collate(rows)
    learners = make_learners(tiny_model, algorithm, 64)
    seen = []

    def remember(minibatch):
        seen.append(minibatch)
        algorithm.remember(minibatch)

    learners.update(batch, update, step=0, prepare=algorithm.prepare, remember=remember)
    first, second = seen[:2], seen[2:]
    assert all(bool(minibatch.previous_losses.isnan().all()) for minibatch in first)
    assert len(first[0].visits | first[1].visits) == 4
    for minibatch in second:
        before = {**first[0].visits, **first[1].visits}
        expected = [before[name] for name in minibatch.sample_ids]
        assert minibatch.previous_losses.tolist() == pytest.approx(expected)
        assert all(minibatch.visits[name] < before[name] for name in minibatch.sample_ids)
    state = json.loads(json.dumps(algorithm.state_dict()))
    assert state == {"expert_memory": {**second[0].visits, **second[1].visits}}
    resumed = Sft(algorithm.config, algorithm.setup)
    resumed.load_state_dict(state)
    assert resumed.expert_memory == algorithm.expert_memory
    algorithm.prepare(batch, torch.zeros(batch.num_tokens), {})  # as a gradient probe does
    assert algorithm.state_dict() == state
