"""Rows without a gradient are not computed: the same gradient, for every algorithm that says it has such rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rows import make_rows

from plait.algorithms import ALGORITHMS, Setup
from plait.engine.batch import collate, count, with_gradient
from plait.engine.config import LearnerConfig
from plait.engine.learner import LearnerWorker, Rank
from plait.engine.learners import InProcessRank, LearnerGroup
from plait.engine.packing import BLANK_TOKENS
from plait.engine.probes import GradientProbe
from plait.engine.types import Sampling, Source, Update

KINDS = "pppphhee"
SILENT = (1, 2, 4, 7)
"""Rows whose advantage is 0: two of the policy, a hybrid one, an expert one."""
COEFS = {"mu": 0.4, "expert_share": 0.3}
BOTH = frozenset({Source.POLICY, Source.EXPERT})
PLAIN = {
    "entropy_coef": 0.0,
    "kl_coef": 0.0,
    "max_response_length": 16,
    "sampler_ratio_cap": 1.08,
}
REGULARIZED = {"entropy_coef": 0.01}


def build(name: str, **config: Any):
    cls = ALGORITHMS[name]
    known = {key: value for key, value in config.items() if key in cls.Config.model_fields}
    return cls(cls.Config.model_validate({"type": name, **known}), Setup(Sampling(16)))


NAMES = [name for name in ALGORITHMS if name != "stages"]
DECLARED = {name: a for name in NAMES if (a := build(name, **PLAIN)).advantage_only}


class MeasuringRank(InProcessRank):
    """Notes the gradient of each optimizer step instead of taking it."""

    def call(self, method: str, per_rank: Any) -> list[Any]:
        if method != "step":
            return super().call(method, per_rank)
        micro_batches, loss, coefs, *_ = per_rank[0]
        report, self.gradient = self.worker.gradients(micro_batches, loss, coefs)
        return [report]


@pytest.fixture(scope="module")
def worker(tiny_model):
    losses = {f"{n}.{loss}": f for n, a in DECLARED.items() for loss, f in a.losses.items()}
    needs = {f"{n}.{loss}": f for n, a in DECLARED.items() for loss, f in a.needs.items()}
    config = LearnerConfig(max_tokens_per_micro_batch=40)
    return LearnerWorker(str(tiny_model), config, losses, needs, Rank())


def make_batch():
    rows = make_rows(KINDS)
    rows = [
        replace(row.with_advantage(a).with_advantage(a, on=Source.EXPERT), group_id=f"g{i // 2}")
        for i, row in enumerate(rows)
        for a in [0.0 if i in SILENT else (-1.0) ** i * (0.3 + i)]
    ]
    batch = collate(rows)
    torch.manual_seed(0)
    column = torch.randn(batch.num_tokens) * 0.2 - 5.7
    return replace(batch, old_logprobs=column, rollout_logprobs=column + 0.1)


def measure(worker, loss: str, batch, advantage_only):
    ranks = MeasuringRank(worker)
    learners = LearnerGroup(
        ranks,
        worker.config,
        worker.needs,
        total_steps=9,
        seed=0,
        route=None,  # pyright: ignore[reportArgumentType]
        advantage_only=advantage_only,
    )
    (report,) = learners.update(batch, Update((), loss, COEFS), step=0)
    return report, ranks.gradient


@pytest.mark.parametrize("name", DECLARED)
def test_left_out_rows_change_no_gradient(worker, name):
    for loss, sources in DECLARED[name].advantage_only.items():
        loss, batch = f"{name}.{loss}", make_batch()
        kept, expected = measure(worker, loss, batch, None)
        dropped, found = measure(worker, loss, batch, {loss: sources})
        assert kept.metrics["left_out_rows"] == 0
        # A row that trains EXPERT tokens stays, unless they too train by their advantage alone.
        assert dropped.metrics["left_out_rows"] == (4 if sources == BOTH else 2)
        assert dropped.tokens["computed"] == batch.num_tokens - dropped.tokens["left_out"]
        assert dropped.tokens["policy"] == kept.tokens["policy"], "they were trained, by nothing"
        assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
        assert found.keys() == expected.keys()
        for parameter, gradient in expected.items():
            torch.testing.assert_close(found[parameter], gradient, atol=1e-6, rtol=1e-6)
        assert dropped.grad_norm == pytest.approx(kept.grad_norm, rel=1e-5)
        for metric in ("loss", "policy_loss", "expert_loss", "expert_gradient_share"):
            if metric in kept.metrics:
                assert dropped.metrics[metric] == pytest.approx(kept.metrics[metric], abs=1e-6)


def test_most_algorithms_say_it_and_no_regularized_one_does():
    assert {"grpo", "chord", "luffy", "prefix_rft", "ppo", "visurf", "rift"} <= DECLARED.keys()
    assert not {"sft", "one_token_rollout", "regft", "amft"} & DECLARED.keys()
    for name in DECLARED:
        assert not build(name, **{**PLAIN, **REGULARIZED}).advantage_only, name
        if "kl_coef" in ALGORITHMS[name].Config.model_fields:
            assert not build(name, **{**PLAIN, "kl_coef": 0.1}).advantage_only, name
    stages = [
        {"steps": 1, "algorithm": {"type": "sft"}},
        {"algorithm": {"type": "luffy", "entropy_coef": 0.0}},
    ]
    cls = ALGORITHMS["stages"]
    config = cls.Config.model_validate({"type": "stages", "stages": stages})
    assert cls(config, Setup(Sampling(16))).advantage_only == {"1.main": BOTH}


def test_a_wrong_declaration_would_be_seen(worker):
    """The comparison above can fail: chord's expert rows train whatever their advantage is."""
    batch = make_batch()
    _, expected = measure(worker, "chord.main", batch, None)
    _, found = measure(worker, "chord.main", batch, {"chord.main": BOTH})
    largest = max((found[name] - g).abs().max() for name, g in expected.items())
    assert largest > 1e-4


def test_metrics_are_means_over_what_was_computed(worker):
    """Old log-probs 0.7 below the current ones on computed rows: their mean ratio is e^0.7, with or without."""
    batch = make_batch()
    (current,) = worker.annotate([batch], frozenset({"old_logprobs"}))
    batch = replace(batch, old_logprobs=current["old_logprobs"] - 0.7)
    report, _ = measure(worker, "grpo.main", batch, {"grpo.main": frozenset({Source.POLICY})})
    assert report.metrics["left_out_rows"] == 2
    assert report.metrics["ratio_mean"] == pytest.approx(torch.tensor(0.7).exp().item(), rel=1e-4)


def test_where_no_row_has_a_gradient_the_step_is_taken_all_the_same(worker):
    batch = make_batch()
    batch = replace(batch, advantages=batch.advantages * 0)
    report, gradient = measure(worker, "luffy.main", batch, {"luffy.main": BOTH})
    assert report.metrics["left_out_rows"] == len(KINDS)
    assert report.tokens["computed"] == BLANK_TOKENS
    assert report.grad_norm == 0
    assert not any(g.any() for g in gradient.values())


def test_rows_that_train_nothing_are_left_out_of_every_loss():
    rows = make_rows("ppe")
    rows[0].weights[:] = 0
    batch = collate(rows)
    live = with_gradient(batch, frozenset())
    assert live.num_rows == 2
    assert live.denom.left_out == count(collate(rows[:1]))
    assert replace(live.denom, left_out=None) == batch.denom
    assert with_gradient(live, frozenset()).num_rows == 2
    rows[0] = replace(rows[0], pair="rejected")
    assert with_gradient(collate(rows), frozenset()).num_rows == 3, "something may compare with it"


def test_probes_leave_the_same_rows_out(worker):
    learners = LearnerGroup(
        InProcessRank(worker),
        worker.config,
        worker.needs,
        total_steps=9,
        seed=0,
        route=None,  # pyright: ignore[reportArgumentType]
        advantage_only={"grpo.main": frozenset({Source.POLICY})},
    )
    batch = make_batch()
    probes = [GradientProbe("left out", batch, "grpo.main", {})]
    (dropped,) = learners.compare_gradients(probes, step=0).gram
    learners.advantage_only = {}
    (kept,) = learners.compare_gradients(probes, step=0).gram
    assert dropped[0] == pytest.approx(kept[0], rel=1e-5)


@pytest.mark.parametrize(("epochs", "recorded"), [(1, 0.0), (2, 1.0)])
def test_the_report_says_which_old_log_probs_were_used(worker, epochs, recorded):
    """One optimizer step for the batch: no pass before it, and the same gradient as with one."""
    batch = replace(make_batch(), old_logprobs=None)
    ranks = MeasuringRank(worker)
    learners = LearnerGroup(
        ranks,
        worker.config,
        worker.needs,
        total_steps=9,
        seed=0,
        route=None,  # pyright: ignore[reportArgumentType]
    )
    needs = worker.needs["grpo.main"]
    annotated = learners.annotate(batch, needs, single=epochs == 1)
    assert (annotated.old_logprobs is not None) == bool(recorded)
    update = Update((), "grpo.main", {}, epochs=epochs)
    reports = learners.update(annotated, update, step=0)
    assert [r.metrics["old_logprobs_recorded"] for r in reports] == [recorded] * epochs
    found = ranks.gradient
    with_pass = learners.annotate(batch, needs, single=False)
    learners.update(with_pass, replace(update, epochs=1), step=0)
    for name, gradient in ranks.gradient.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-6)


def test_rows_that_are_left_out_need_no_old_log_probs(worker):
    batch = replace(make_batch(), old_logprobs=None)
    learners = LearnerGroup(
        InProcessRank(worker),
        worker.config,
        worker.needs,
        total_steps=9,
        seed=0,
        route=None,  # pyright: ignore[reportArgumentType]
        advantage_only={"grpo.main": frozenset({Source.POLICY})},
    )
    needs = worker.needs["grpo.main"]
    whole = learners.annotate(batch, needs, single=False).old_logprobs
    found = learners.annotate(batch, needs, single=False, loss="grpo.main").old_logprobs
    assert whole is not None
    assert found is not None
    absent = (batch.row_ids == 1) | (batch.row_ids == 2)
    assert torch.equal(found.isnan(), absent)
    torch.testing.assert_close(found[~absent], whole[~absent])
    read_before = learners.annotate(
        batch, needs | {"recorded_logprobs"}, single=False, loss="grpo.main"
    )
    assert read_before.old_logprobs is not None
    torch.testing.assert_close(read_before.old_logprobs, whole)
    silent = replace(batch, advantages=batch.advantages * 0, source=batch.source.clamp(max=1))
    nothing = learners.annotate(silent, needs, single=False, loss="grpo.main").old_logprobs
    assert nothing is not None
    assert nothing.isnan().all()
