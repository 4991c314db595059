"""What rows begin with is computed once, and nothing else changes: log-probs, values, gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from rows import make_rows

from plait.algorithms import Setup
from plait.algorithms.chord import Chord, ChordConfig
from plait.algorithms.ppo import Ppo, PpoConfig
from plait.engine.batch import collate, select
from plait.engine.config import LearnerConfig
from plait.engine.critic import load_critic
from plait.engine.learner import LearnerWorker, Rank
from plait.engine.learners import InProcessRank, LearnerGroup
from plait.engine.model import PolicyModel, load_model
from plait.engine.shared_prefix import lay_out, mark_prefixes
from plait.engine.types import Sampling, Source, Update
from tiny_model import FAMILIES, make_tiny_model

EVERYTHING = ChordConfig(entropy_coef=0.01, kl_coef=0.05, sampler_ratio_cap=2.0)
ALGORITHM = Chord(EVERYTHING, Setup(Sampling(16)))
COEFS = {"mu": 0.4}


def make_groups(context: int = 7, long: int = 0):
    """Rows 0-3 of one prompt (one of them an expert's), 4-5 of another that also share two response tokens, 6 alone.

    `long`: tokens added to the first prompt.
    """
    rows, prompts = make_rows("pphepppp"), np.random.default_rng(1).integers(3, 300, (3, 512))
    found = []
    for i, row in enumerate(rows[:7]):
        group = 0 if i < 4 else 1 if i < 6 else 2
        start = int((row.source == Source.CONTEXT).sum())
        size = context + group + (long if group == 0 else 0)
        own = {name: getattr(row, name)[start:] for name in COLUMNS}
        if group == 1:
            own["token_ids"] = own["token_ids"].copy()
            own["token_ids"][:2] = (17, 18)
        before = {
            "token_ids": prompts[group, :size].astype(np.int32),
            "source": np.zeros(size, dtype=np.int8),
            "advantages": np.zeros(size, dtype=np.float32),
            "weights": np.ones(size, dtype=np.float32),
            "rollout_logprobs": np.full(size, np.nan, dtype=np.float32),
        }
        columns = {name: np.concatenate([before[name], own[name]]) for name in COLUMNS}
        found.append(replace(row, **columns, group_id=f"g{group}"))
    return found


COLUMNS = ("token_ids", "source", "advantages", "weights", "rollout_logprobs")


def make_batch(**sizes):
    batch = collate(make_groups(**sizes))
    torch.manual_seed(0)
    column = torch.randn(batch.num_tokens) * 0.2 - 5.7
    return replace(batch, old_logprobs=column, ref_logprobs=column - 0.1)


def test_rows_of_a_prompt_are_marked_with_what_all_of_them_share():
    batch = mark_prefixes(make_batch())
    assert batch.prefix_ids is not None
    assert batch.prefix_lengths is not None
    assert batch.prefix_ids.tolist() == [0, 0, 0, 0, 1, 1, -1]
    assert batch.prefix_lengths.tolist() == [7, 7, 7, 7, 10, 10, 0]


def test_each_token_has_one_place():
    batch = mark_prefixes(make_batch())
    found = lay_out(batch)
    assert found is not None
    assert len(found.tokens) == sum(found.lengths) == batch.num_tokens - 3 * 7 - 10
    assert torch.equal(batch.input_ids[found.tokens][found.places], batch.input_ids)
    assert torch.equal(batch.position_ids[found.tokens][found.places], batch.position_ids)
    assert found.continues == [None, 0, 0, 0, 0, None, 5, 5, None]


def test_a_row_whose_relatives_are_elsewhere_is_whole():
    batch = mark_prefixes(make_batch())
    assert lay_out(select(batch, [0, 4, 6])) is None
    found = lay_out(select(batch, [3, 4, 1]))
    assert found is not None
    assert found.continues == [None, 0, 0, None]
    assert lay_out(make_batch()) is None


def test_rows_with_hidden_tokens_are_not_marked():
    batch = make_batch()
    batch = replace(batch, hidden=torch.zeros(batch.num_tokens, dtype=torch.bool))
    assert mark_prefixes(batch) is batch


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp(request.param), family=request.param)


def test_every_family_gives_the_same_log_probs_and_gradients(family):
    """Prompts are longer than the sliding window of Gemma 2 and 3, 64."""
    batch = make_batch(long=90)
    outputs = []
    for rows in (batch, mark_prefixes(batch)):
        model = load_model(str(family), LearnerConfig())
        policy = PolicyModel(model, packing=True, logit_chunk_tokens=16)
        out = policy(rows, frozenset({"entropy"}))
        assert out.entropy is not None
        (out.logprobs.sum() + 0.1 * out.entropy.sum()).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        outputs.append((out.logprobs.detach(), grads))
    (plain, expected), (shared, found) = outputs
    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=0)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, atol=2e-6 * max(scale, 1), rtol=1e-4)


@pytest.fixture(scope="module")
def worker(tiny_model):
    return LearnerWorker(
        str(tiny_model), LearnerConfig(), ALGORITHM.losses, ALGORITHM.needs, Rank()
    )


def test_the_gradient_of_a_step_is_that_of_whole_rows(worker):
    batch = make_batch()
    report, expected = worker.gradients([batch], "main", COEFS)
    marked = mark_prefixes(batch)
    for plan in ([range(7)], [[0, 2, 5], [1, 3, 4, 6]]):
        parts = [select(marked, list(rows)) for rows in plan]
        shared, found = worker.gradients(parts, "main", COEFS)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-6)
        assert shared.grad_norm == pytest.approx(report.grad_norm, rel=1e-5)
        for name, value in report.metrics.items():
            assert shared.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_gradient_checkpointing_shares_too(tiny_model, worker):
    config = LearnerConfig(gradient_checkpointing=True)
    other = LearnerWorker(str(tiny_model), config, ALGORITHM.losses, ALGORITHM.needs, Rank())
    batch = mark_prefixes(make_batch())
    _, expected = worker.gradients([batch], "main", COEFS)
    _, found = other.gradients([batch], "main", COEFS)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-6)


def test_values_of_a_critic_are_the_same(tiny_model):
    critic = load_critic(str(tiny_model), LearnerConfig())
    torch.nn.init.normal_(critic.value_head.weight)
    batch = make_batch()
    with torch.no_grad():
        torch.testing.assert_close(critic(mark_prefixes(batch)), critic(batch))


@pytest.mark.parametrize("shares", [True, False])
def test_the_learner_marks_rows_where_the_recipe_says_so(worker, shares):
    config = LearnerConfig(share_prefixes=shares, max_tokens_per_micro_batch=70)
    learners = LearnerGroup(
        InProcessRank(worker),
        config,
        ALGORITHM.needs,
        total_steps=9,
        seed=0,
        route=None,  # pyright: ignore[reportArgumentType]
    )
    batch = make_batch()
    columns = learners.annotate(batch, frozenset({"old_logprobs"}), single=False)
    assert columns.prefix_ids is None
    expected = worker.annotate([batch], frozenset({"old_logprobs"}))[0]["old_logprobs"]
    torch.testing.assert_close(columns.old_logprobs, expected)
    (report,) = learners.update(batch, Update((), "main", COEFS), step=0)
    saved = batch.num_tokens - report.tokens["computed"]
    assert saved > 7 if shares else saved == 0


def test_what_cannot_share_says_so():
    assert LearnerConfig().shares_prefixes
    assert not LearnerConfig(packing=False).shares_prefixes
    assert not LearnerConfig(device="cuda").shares_prefixes
    assert LearnerConfig(device="cuda", attention="segments").shares_prefixes


def test_a_step_of_ppo_shares_in_both_models(tiny_model):
    algorithm = Ppo(PpoConfig(), Setup(Sampling(16)))
    worker = LearnerWorker(
        str(tiny_model), LearnerConfig(), algorithm.losses, algorithm.needs, Rank()
    )
    batch, nothing = make_batch(), torch.zeros(make_batch().num_tokens)
    batch = select(replace(batch, values=nothing, returns=nothing + 1), [0, 1, 4, 5])
    for loss in ("main", "critic"):
        worker.step([batch], loss, {}, 1e-3)  # moves the value head off 0
        _, expected = worker.gradients([batch], loss, {})
        _, found = worker.gradients([mark_prefixes(batch)], loss, {})
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
