"""Real DeepSpeed engines: one gradient, however the minibatch is cut."""

from __future__ import annotations

import os
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import make_rows

from plait.algorithms import Setup
from plait.algorithms.chord import Chord, ChordConfig
from plait.engine.batch import collate, select
from plait.engine.config import LearnerConfig, LoraConfig
from plait.engine.learner import LearnerWorker, Rank, WeightRoute, learning_rate
from plait.engine.ray_ranks import RemoteLearner
from plait.engine.types import Sampling, Source
from saved_state import save_state

KINDS = "ppephe"
BUFFER = "memfd:plait-weights"
EVERYTHING = ChordConfig(entropy_coef=0.01, kl_coef=0.05, sampler_ratio_cap=2.0)
ALGORITHM = Chord(EVERYTHING, Setup(Sampling(16)))
COEFS = {"mu": 0.4}
CUTS = {
    "all": [[0, 1, 2, 3, 4, 5]],
    "size 2": [[0, 1], [2, 3], [4, 5]],
    "size 1": [[0], [1], [2], [3], [4], [5]],
    "uneven": [[5, 0, 2], [], [3], [1, 4]],
}


def make_worker(model, config: LearnerConfig) -> LearnerWorker:
    return LearnerWorker(str(model), config, ALGORITHM.losses, ALGORITHM.needs, Rank())


def make_batch():
    batch = collate(make_rows(KINDS))
    torch.manual_seed(0)
    column = torch.randn(batch.num_tokens) * 0.2 - 5.7
    return replace(batch, old_logprobs=column, ref_logprobs=column - 0.1)


def cut(batch, plan):
    return [select(batch, rows) for rows in plan]


@pytest.fixture(scope="module")
def reference(tiny_model):
    """Gradient of the whole minibatch in one packed micro-batch on one rank."""
    worker = make_worker(tiny_model, LearnerConfig())
    return worker.gradients(cut(make_batch(), CUTS["all"]), "main", COEFS)


def assert_same_gradient(found, reference, tolerance=1e-6):
    report, gradients = found
    expected_report, expected = reference
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=tolerance, rtol=tolerance)
    assert report.grad_norm == pytest.approx(expected_report.grad_norm, rel=1e-5)
    for name, value in expected_report.metrics.items():
        assert report.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_cutting_into_micro_batches_changes_nothing(tiny_model, reference, packing, zero_stage):
    worker = make_worker(tiny_model, LearnerConfig(packing=packing, zero_stage=zero_stage))
    for plan in CUTS.values():
        found = worker.gradients(cut(make_batch(), plan), "main", COEFS)
        assert_same_gradient(found, reference)


def test_chunked_logits_change_nothing(tiny_model, reference):
    worker = make_worker(tiny_model, LearnerConfig(logit_chunk_tokens=3))
    assert_same_gradient(worker.gradients([make_batch()], "main", COEFS), reference)


def test_gradient_checkpointing_changes_nothing(tiny_model, reference):
    worker = make_worker(tiny_model, LearnerConfig(gradient_checkpointing=True))
    assert_same_gradient(worker.gradients([make_batch()], "main", COEFS), reference)


def test_a_wrong_denominator_would_be_seen(tiny_model, reference):
    """The comparison above can fail: per-micro-batch counts give another gradient."""
    from plait.engine.batch import count

    worker = make_worker(tiny_model, LearnerConfig())
    local = [replace(part, denom=count(part)) for part in cut(make_batch(), CUTS["size 2"])]
    with pytest.raises(AssertionError):
        assert_same_gradient(worker.gradients(local, "main", COEFS), reference)


@pytest.fixture(scope="module")
def two_ranks(ray_session):
    """Two Ray actors that can be given one configuration after another."""
    import ray

    actor: Any = ray.remote(RemoteLearner).options(num_cpus=0)  # pyright: ignore[reportAttributeAccessIssue]
    workers: list[Any] = [actor.remote() for _ in range(2)]
    address, port = ray.get(workers[0].rendezvous.remote(), timeout=120)

    def start(model, config):
        ranks = [Rank(i, 2, address, port) for i in range(2)]
        args = (str(model), config, ALGORITHM.losses, ALGORITHM.needs)
        ray.get(
            [w.start.remote(*args, rank) for w, rank in zip(workers, ranks, strict=True)],
            timeout=300,
        )

    def call(method, *per_rank):
        calls = zip(workers, per_rank, strict=True)
        return ray.get([w.call.remote(method, *args) for w, args in calls], timeout=300)

    yield start, call
    for worker in workers:
        ray.kill(worker)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_give_the_gradient_of_one(tiny_model, reference, two_ranks, zero_stage):
    start, call = two_ranks
    start(tiny_model, LearnerConfig(num_workers=2, zero_stage=zero_stage, num_cpus=1))
    batch = make_batch()
    splits = {
        "mixed": ([[0, 2], [4]], [[1, 3], [5]]),
        "no expert row on rank 0, only expert rows on rank 1": ([[0, 1, 3]], [[2, 4, 5]]),
        "nothing on rank 1": ([[0, 1, 2], [3, 4, 5]], [[], []]),
    }
    # Row 3 is policy, 4 is hybrid and 5 an expert row: see KINDS. Rank 1 of the second split has no pure policy row.
    for first, second in splits.values():
        answers = call(
            "gradients", (cut(batch, first), "main", COEFS), (cut(batch, second), "main", COEFS)
        )
        for answer in answers:
            assert_same_gradient(answer, reference)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_two_ranks_compare_gradients_as_one(tiny_model, reference, two_ranks, zero_stage):
    start, call = two_ranks
    start(tiny_model, LearnerConfig(num_workers=2, zero_stage=zero_stage, num_cpus=1))
    batch = make_batch()
    sources = (Source.EXPERT, Source.POLICY, None)

    def probes(plan):
        return [(cut(batch, plan), "main", COEFS, only) for only in sources]

    answers = call("compare_gradients", (probes([[0, 1, 3]]),), (probes([[2, 4, 5]]),))
    for gram, metrics in answers:
        expert, policy, whole = range(3)
        parts = gram[expert][expert] + gram[policy][policy] + 2 * gram[expert][policy]
        assert parts == pytest.approx(gram[whole][whole], rel=1e-5)
        assert gram[whole][whole] ** 0.5 == pytest.approx(reference[0].grad_norm, rel=1e-5)
        assert metrics[whole]["loss"] == pytest.approx(reference[0].metrics["loss"], rel=1e-5)


def test_the_optimizer_step_is_adamw_on_the_clipped_gradient(tiny_model, reference):
    """Against torch's own AdamW, parameter by parameter."""
    report, gradients = reference
    config = LearnerConfig(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5)
    worker = make_worker(tiny_model, config)
    before = {n: p.detach().clone() for n, p in worker.engine.module.named_parameters()}
    worker.step([make_batch()], "main", COEFS, 1e-3)
    scale = min(1.0, 0.5 / report.grad_norm)
    for name, parameter in worker.engine.module.named_parameters():
        twin = torch.nn.Parameter(before[name].clone())
        twin.grad = gradients[name] * scale
        decay = 0.1 if twin.ndim >= 2 else 0.0
        torch.optim.AdamW([twin], lr=1e-3, weight_decay=decay).step()
        # Where a gradient is near AdamW's epsilon its sign is noise: compare the moved distance.
        torch.testing.assert_close(parameter, twin, atol=2e-5, rtol=0)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_lowers_the_loss_and_survives_a_checkpoint(
    tiny_model, tmp_path, zero_stage, dtype
):
    if zero_stage == 0 and dtype == "bfloat16":
        with pytest.raises(ValueError, match=r"needs learner\.zero_stage"):
            LearnerConfig(zero_stage=0, dtype="bfloat16")
        return
    config = LearnerConfig(zero_stage=zero_stage, dtype=dtype, learning_rate=1e-2)
    worker = make_worker(tiny_model, config)
    batch = make_batch()
    losses = [worker.step([batch], "main", COEFS, 1e-2).metrics["loss"] for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    saved = save_state(worker, tmp_path)
    after_save = worker.step([batch], "main", COEFS, 1e-2)
    worker.load(saved)
    assert worker.step([batch], "main", COEFS, 1e-2) == after_save


def test_lora_trains_adapters_only_and_exports_merged_weights(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    worker = make_worker(
        tiny_model,
        LearnerConfig(parameter_selection=LoraConfig(type="lora", rank=4), learning_rate=1e-2),
    )
    trained = {n for n, p in worker.engine.module.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    for _ in range(2):
        worker.step([make_batch()], "main", COEFS, 1e-2)
    sequence = [5, 9, 200, 31, 7]
    ours = worker.logprobs([sequence])[0]
    worker.export(str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([sequence])
    with torch.no_grad():
        theirs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(ours), theirs, atol=1e-5, rtol=0)


def test_a_loss_that_is_not_finite_is_named_and_not_applied(tiny_model):
    worker = make_worker(tiny_model, LearnerConfig())
    before = [p.detach().clone() for p in worker.engine.module.parameters()]
    batch = make_batch()
    broken = replace(batch, advantages=batch.advantages * float("inf"))
    report = worker.step([broken], "main", COEFS, 1e-3)
    assert not report.applied
    assert "policy_loss" in report.skipped.split(", ")
    assert all(isfinite(value) for value in report.metrics.values())
    for parameter, old in zip(worker.engine.module.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.875]),
        ("cosine", [0.5, 1, 1, 0.961940]),
    ],
)
def test_learning_rate_is_a_function_of_the_step(schedule, expected):
    config = LearnerConfig(learning_rate=1.0, schedule=schedule, warmup_ratio=0.2)
    rates = [learning_rate(config, step, 10) for step in range(4)]
    assert rates == pytest.approx(expected)


def test_receivers_that_come_and_go_cost_no_memory(tiny_model):
    """Each replaced rollout worker is one more connection."""
    worker = make_worker(tiny_model, LearnerConfig())
    route = WeightRoute("shared_memory", "float32", 10.0)
    for version in range(3):
        worker.connect((), route)
        worker.send_weights(version)
    names = (os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink())
    held = [name for name in names if BUFFER in name]
    worker.close()
    assert len(held) == 1
