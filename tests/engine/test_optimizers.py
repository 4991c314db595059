"""Two sets of AdamW moments over one set of weights, a movable reference, and tokens drawn in the LM head."""

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
from plait.engine.learner import LearnerWorker, Rank
from plait.engine.learners import InProcessRank, LearnerGroup
from plait.engine.token_samples import draw, expected_sums, sampled_sums, uniforms
from plait.engine.types import Sampling, TokenSampling, Update
from saved_state import save_state

RATE = 1e-2
COEFS = {"mu": 0.4}


def make_worker(model, algorithm, **config):
    return LearnerWorker(
        str(model),
        LearnerConfig(learning_rate=RATE, **config),
        algorithm.losses,
        algorithm.needs,
        Rank(),
        algorithm.token_sampling,
        entropy_top_k=algorithm.entropy_top_k,
    )


def chord(**config):
    return Chord(ChordConfig(**config), Setup(Sampling(16)))


def make_batch(kinds="ppephe", seed=0):
    batch = collate(make_rows(kinds, seed))
    column = torch.full((batch.num_tokens,), -5.7)
    return replace(batch, old_logprobs=column, ref_logprobs=column)


def moments(states):
    return [state["exp_avg"].clone() for state in states.values() if "exp_avg" in state]


def weights(worker):
    return {name: weight.clone() for name, weight in worker._full_weights()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], atol=0, rtol=0)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_moment_sets_are_independent_and_survive_a_checkpoint(tiny_model, tmp_path, zero_stage):
    worker = make_worker(tiny_model, chord(), zero_stage=zero_stage)
    main_batch, expert_batch = make_batch(), make_batch("eee", seed=1)
    worker.step([main_batch], "main", COEFS, RATE)
    inner = worker.engine.moments._inner
    main = moments(inner.state)
    assert main
    worker.step([expert_batch], "main", COEFS, RATE, "expert")
    expert = moments(worker.engine.moments._others["expert"])
    for before, after in zip(main, moments(inner.state), strict=True):
        assert torch.equal(before, after)
    assert any(not torch.equal(a, b) for a, b in zip(main, expert, strict=True))
    worker.step([main_batch], "main", COEFS, RATE)
    for before, after in zip(expert, moments(worker.engine.moments._others["expert"]), strict=True):
        assert torch.equal(before, after)

    saved = save_state(worker, tmp_path)

    def go_on():
        reports = [
            worker.step([expert_batch], "main", COEFS, RATE, "expert"),
            worker.step([main_batch], "main", COEFS, RATE),
        ]
        return reports, weights(worker)

    reports, reached = go_on()
    worker.load(saved)
    again, reached_again = go_on()
    assert again == reports
    assert_equal(reached, reached_again)
    # The moments matter: without them the same two steps lead elsewhere.
    worker.load(saved)
    worker.engine.moments._others.clear()
    _, elsewhere = go_on()
    assert any(not torch.equal(reached[name], elsewhere[name]) for name in reached)


def test_an_expert_step_equals_a_fresh_optimizers_first_step(tiny_model):
    """Its moments start empty, whatever `main` has seen."""
    expert_batch = make_batch("eee", seed=1)
    used = make_worker(tiny_model, chord())
    used.step([make_batch()], "main", COEFS, 0.0)  # moments, but the weights stay
    used.step([expert_batch], "main", COEFS, RATE, "expert")
    fresh = make_worker(tiny_model, chord())
    fresh.step([expert_batch], "main", COEFS, RATE)
    assert_equal(weights(used), weights(fresh))


def group_of(worker, algorithm):
    return LearnerGroup(
        InProcessRank(worker),
        worker.config,
        algorithm.needs,
        total_steps=10,
        seed=0,
        route=None,  # pyright: ignore[reportArgumentType]
    )


def test_a_fixed_learning_rate_overrides_the_schedule(tiny_model):
    algorithm = chord()
    learners = group_of(make_worker(tiny_model, algorithm, schedule="linear"), algorithm)
    samples = tuple(make_rows("pe"))
    (report,) = learners.update(collate(samples), Update(samples, "main", COEFS), step=5)
    assert report.learning_rate == pytest.approx(RATE / 2)
    fixed = Update(samples, "main", COEFS, learning_rate=3e-4, optimizer="expert")
    (report,) = learners.update(collate(samples), fixed, step=5)
    assert report.learning_rate == 3e-4


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_refreshed_reference_is_the_policy_and_is_saved(tiny_model, tmp_path, zero_stage):
    algorithm = chord(kl_coef=0.1)
    worker = make_worker(tiny_model, algorithm, zero_stage=zero_stage)
    batch = make_batch()
    needs = frozenset({"old_logprobs", "ref_logprobs"})

    def gap(worker):
        (columns,) = worker.annotate([batch], needs)
        return (columns["old_logprobs"] - columns["ref_logprobs"]).abs().max()

    worker.step([batch], "main", COEFS, RATE)
    assert gap(worker) > 1e-3
    group_of(worker, algorithm).refresh_reference()
    assert gap(worker) < 1e-5
    worker.step([batch], "main", COEFS, RATE)
    moved = gap(worker)
    assert moved > 1e-3
    saved = save_state(worker, tmp_path)
    other = make_worker(tiny_model, algorithm, zero_stage=zero_stage)
    other.load(saved)
    assert gap(other) == pytest.approx(float(moved), abs=1e-5)


# -- tokens drawn in the LM head -----------------------------------------------------------------


def one_token(**config: Any):
    settings = OneTokenRolloutConfig(**{"samples_per_token": 8, **config})
    return OneTokenRollout(settings, Setup(Sampling(16)))


@pytest.mark.parametrize("config", [{}, {"exact_expectation": True}, {"tempered_logprobs": True}])
def test_draws_do_not_depend_on_micro_batches_or_chunks(tiny_model, config):
    algorithm = one_token(**config)
    batch = collate(make_rows("eeee"))
    whole = make_worker(tiny_model, algorithm).gradients([batch], "main", {})
    cut = make_worker(tiny_model, algorithm, logit_chunk_tokens=3, packing=False)
    parts = [select(batch, rows) for rows in ([3, 0], [], [2], [1])]
    found = cut.gradients(parts, "main", {})
    assert found[0].metrics["hit_rate"] == pytest.approx(whole[0].metrics["hit_rate"], abs=1e-6)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_each_step_epoch_and_row_draws_anew():
    seeds, positions = torch.tensor([3, 3, 4]), torch.tensor([5, 6, 5])
    values = uniforms(seeds, positions, 1000)
    assert ((values >= 0) & (values < 1)).all()
    assert values.mean(-1).sub(0.5).abs().max() < 0.05
    assert len(values.flatten().unique()) == 3000
    correlation = torch.corrcoef(values)
    assert (correlation - torch.eye(3)).abs().max() < 0.12
    assert torch.equal(uniforms(seeds[2:], positions[2:], 1000)[0], values[2])


def test_sampled_sums_approach_their_expectation():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 3, 5])
    sampling = TokenSampling(40_000, 1.3)
    chances = uniforms(torch.arange(3), torch.arange(3), sampling.num_samples)
    samples = draw(logits, chances, sampling.temperature)
    sampled = sampled_sums(logits, targets, samples, sampling)
    for found, expected in zip(sampled, expected_sums(logits, targets, sampling), strict=True):
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
