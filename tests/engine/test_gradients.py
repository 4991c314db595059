"""Gradients by source: they add up, their dot products are right, and measuring them changes nothing of a run."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from rows import make_rows

from plait.algorithms import Setup
from plait.algorithms.chord import Chord, ChordConfig
from plait.algorithms.one_token_rollout import OneTokenRollout, OneTokenRolloutConfig
from plait.engine.batch import collate, select
from plait.engine.config import LearnerConfig
from plait.engine.learner import LearnerWorker, Rank, WeightRoute
from plait.engine.learners import InProcessRank, LearnerGroup
from plait.engine.probes import GradientProbe
from plait.engine.types import Sampling, Source

RATE = 1e-2
COEFS = {"mu": 0.4}
EVERYTHING = ChordConfig(entropy_coef=0.01, entropy_scope="all", kl_coef=0.05)
SETTINGS = [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (2, "bfloat16")]


def make_worker(model, algorithm: Any = None, **config):
    algorithm = algorithm or Chord(EVERYTHING, Setup(Sampling(16)))
    return LearnerWorker(
        str(model),
        LearnerConfig(learning_rate=RATE, **config),
        algorithm.losses,
        algorithm.needs,
        Rank(),
        algorithm.token_sampling,
        entropy_top_k=algorithm.entropy_top_k,
    )


def make_batch(kinds="ppephe"):
    batch = collate(make_rows(kinds))
    column = torch.full((batch.num_tokens,), -5.7)
    return replace(batch, old_logprobs=column, ref_logprobs=column - 0.1)


def group_of(worker):
    route = WeightRoute("shared_memory", "float32", 10.0)
    return LearnerGroup(
        InProcessRank(worker), worker.config, worker.needs, total_steps=9, seed=0, route=route
    )


def assert_parts_add_up(worker, batch, loss, coefs):
    def flat(only):
        found = worker.gradients([batch], loss, coefs, only)[1]
        return {name: gradient.double() for name, gradient in found.items()}

    whole, expert, policy = flat(None), flat(Source.EXPERT), flat(Source.POLICY)
    for name, gradient in whole.items():
        torch.testing.assert_close(expert[name] + policy[name], gradient, atol=1e-6, rtol=1e-4)
    return expert, policy


def test_the_gradients_of_the_two_sources_add_up_to_the_whole(tiny_model):
    worker = make_worker(tiny_model)
    expert, policy = assert_parts_add_up(worker, make_batch(), "main", COEFS)
    assert any(gradient.abs().sum() > 0 for gradient in expert.values())
    assert any(gradient.abs().sum() > 0 for gradient in policy.values())


def test_sampled_tokens_belong_to_the_source_of_their_position(tiny_model):
    algorithm = OneTokenRollout(OneTokenRolloutConfig(), Setup(Sampling(16)))
    worker = make_worker(tiny_model, algorithm)
    _, policy = assert_parts_add_up(worker, make_batch("eee"), "main", {})
    assert all(gradient.abs().sum() == 0 for gradient in policy.values())


@pytest.mark.parametrize(("zero_stage", "dtype"), SETTINGS)
def test_dot_products_are_those_of_the_full_gradients(tiny_model, zero_stage, dtype):
    worker = make_worker(tiny_model, zero_stage=zero_stage, dtype=dtype)
    batch = make_batch()
    probes = [
        GradientProbe("expert", batch, "main", COEFS, Source.EXPERT),
        GradientProbe("policy", batch, "main", COEFS, Source.POLICY),
        GradientProbe("whole", batch, "main", COEFS),
    ]
    found = group_of(worker).compare_gradients(probes, step=0)
    full = [
        torch.cat(
            [
                g.double().flatten()
                for g in worker.gradients([batch], "main", COEFS, p.only)[1].values()
            ]
        )
        for p in probes
    ]
    for one, mine in zip(found.names, full, strict=True):
        for other, theirs in zip(found.names, full, strict=True):
            assert found.dot(one, other) == pytest.approx(float(mine @ theirs), rel=1e-6)
    assert found.metrics[0]["loss"] == pytest.approx(found.metrics[2]["loss"])
    cosine = found.cosine("expert", "policy")
    assert cosine is not None
    assert -1 < cosine < 1


@pytest.mark.parametrize(("zero_stage", "dtype"), SETTINGS)
def test_a_comparison_leaves_no_trace_in_the_steps_that_follow(tiny_model, zero_stage, dtype):
    def run(measure: bool):
        worker = make_worker(tiny_model, zero_stage=zero_stage, dtype=dtype)
        batch = make_batch()
        parts = [select(batch, [0, 1, 2]), select(batch, [3, 4, 5])]
        state = torch.get_rng_state()
        reports = []
        for _ in range(3):
            if measure:
                before = weights(worker)
                probe = GradientProbe("expert", batch, "main", COEFS, Source.EXPERT)
                group_of(worker).compare_gradients([probe, probe], step=0)
                assert_equal(weights(worker), before)
            reports.append(worker.step(parts, "main", COEFS, RATE))
        assert torch.equal(torch.get_rng_state(), state)
        moments = [
            state[name].clone()
            for state in worker.engine.moments._inner.state.values()
            for name in ("exp_avg", "exp_avg_sq")
        ]
        assert moments
        return reports, weights(worker), moments

    plain, measured = run(False), run(True)
    assert plain[0] == measured[0]
    assert_equal(plain[1], measured[1])
    for one, other in zip(plain[2], measured[2], strict=True):
        assert torch.equal(one, other)


def weights(worker):
    return {name: weight.clone() for name, weight in worker._full_weights()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name
