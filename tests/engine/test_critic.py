"""The critic on real DeepSpeed engines: its values, and one gradient however the minibatch is cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rows import make_rows
from transformers import AutoModel, AutoModelForCausalLM

from plait.algorithms import Setup
from plait.algorithms.ppo import Ppo, PpoConfig
from plait.engine.batch import collate, select
from plait.engine.config import LearnerConfig, LoraConfig
from plait.engine.errors import CheckpointError
from plait.engine.learner import LearnerWorker, Rank
from plait.engine.learners import InProcessRank, LearnerGroup
from plait.engine.ray_ranks import RemoteLearner
from plait.engine.run_state import RunState
from plait.engine.types import Sampling, Source, Update
from saved_state import save_state

ALGORITHM = Ppo(PpoConfig(normalizer="rows"), Setup(Sampling(16)))
RATE = 1e-2
CUTS = {
    "size 2": [[0, 1], [2, 3], [4, 5]],
    "size 1": [[0], [1], [2], [3], [4], [5]],
    "uneven, one empty": [[5, 0, 2], [], [3], [1, 4]],
}


def make_worker(model, **config) -> LearnerWorker:
    settings = LearnerConfig(**config)
    return LearnerWorker(str(model), settings, ALGORITHM.losses, ALGORITHM.needs, Rank())


def make_batch(kinds="pppppp"):
    """Values before the step and targets, close enough for both branches of the clipped error."""
    batch = collate(make_rows(kinds))
    torch.manual_seed(0)
    values = torch.randn(batch.num_tokens) * 0.3
    return replace(batch, values=values, returns=values + torch.randn(batch.num_tokens) * 0.3)


def cut(batch, plan):
    return [select(batch, rows) for rows in plan]


def moved(worker, batch=None):
    """A first step takes the head off zero: only then do gradients reach the transformer."""
    worker.step([batch or make_batch()], "critic", {}, RATE)
    return worker


def critic_of(worker) -> Any:
    assert worker.critic is not None
    return worker.critic


@pytest.fixture(scope="module")
def reference(tiny_model):
    return moved(make_worker(tiny_model)).gradients([make_batch()], "critic", {})


def assert_same_gradient(found, reference, tolerance=1e-6):
    report, gradients = found
    expected_report, expected = reference
    assert gradients.keys() == expected.keys()
    assert any(name.startswith("body.") and gradient.any() for name, gradient in expected.items())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=tolerance, rtol=1e-4)
    assert report.grad_norm == pytest.approx(expected_report.grad_norm, rel=1e-4)
    assert report.metrics == pytest.approx(expected_report.metrics, rel=1e-4, abs=1e-6)
    assert report.model == "critic"


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_cutting_into_micro_batches_changes_nothing(tiny_model, reference, packing, zero_stage):
    worker = moved(make_worker(tiny_model, packing=packing, zero_stage=zero_stage))
    for plan in CUTS.values():
        found = worker.gradients(cut(make_batch(), plan), "critic", {})
        assert_same_gradient(found, reference)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_two_ranks_give_the_gradient_of_one(tiny_model, reference, ray_session, zero_stage):
    import ray

    actor: Any = ray.remote(RemoteLearner).options(num_cpus=0)  # pyright: ignore[reportAttributeAccessIssue]
    workers: list[Any] = [actor.remote() for _ in range(2)]
    address, port = ray.get(workers[0].rendezvous.remote(), timeout=120)
    config = LearnerConfig(num_workers=2, zero_stage=zero_stage, num_cpus=1)
    args = (str(tiny_model), config, ALGORITHM.losses, ALGORITHM.needs)
    ranks = [Rank(i, 2, address, port) for i in range(2)]

    def call(method, *per_rank):
        calls = zip(workers, per_rank, strict=True)
        return ray.get([w.call.remote(method, *args) for w, args in calls], timeout=300)

    try:
        started = zip(workers, ranks, strict=True)
        ray.get([w.start.remote(*args, rank) for w, rank in started], timeout=300)
        batch = make_batch()
        first, second = cut(batch, [[0, 2], [4]]), cut(batch, [[1, 3], [5]])
        call("step", (first, "critic", {}, RATE), (second, "critic", {}, RATE))
        splits = {
            "mixed": (first, second),
            "nothing on rank 1": (cut(batch, [[0, 1, 2], [3, 4, 5]]), cut(batch, [[], []])),
        }
        for one, other in splits.values():
            for answer in call("gradients", (one, "critic", {}), (other, "critic", {})):
                assert_same_gradient(answer, reference)
    finally:
        for worker in workers:
            ray.kill(worker)


def test_the_gradient_is_the_slope_of_the_loss(tiny_model):
    """Along a random direction in the space of all parameters, by central differences."""
    worker = moved(make_worker(tiny_model))
    _, gradients = worker.gradients([make_batch()], "critic", {})
    generator = torch.Generator().manual_seed(1)
    parameters = dict(critic_of(worker).module.named_parameters())
    direction = {n: torch.randn(g.shape, generator=generator) for n, g in gradients.items()}
    # Half along the gradient, so that the change of the loss stands out of float32 rounding.
    norm = sum(float(g.pow(2).sum()) for g in gradients.values()) ** 0.5
    length = sum(float(d.pow(2).sum()) for d in direction.values()) ** 0.5
    direction = {n: d / length + gradients[n] / norm for n, d in direction.items()}

    def loss_at(distance):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(direction[name], alpha=distance)
        loss = worker.gradients([make_batch()], "critic", {})[0].metrics["loss"]
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.sub_(direction[name], alpha=distance)
        return loss

    slope = (loss_at(3e-3) - loss_at(-3e-3)) / 6e-3
    expected = sum(float((gradients[n] * d).sum()) for n, d in direction.items())
    assert slope == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_initial_values_are_zero(tiny_model, zero_stage):
    worker = make_worker(tiny_model, zero_stage=zero_stage)
    (columns,) = worker.annotate([make_batch()], frozenset({"values"}))
    assert columns.keys() == {"values"}
    assert not columns["values"].any()


def test_a_value_is_of_the_state_before_its_token(tiny_model):
    """Against transformers' own body on each row by itself."""
    worker = moved(make_worker(tiny_model))
    batch = make_batch("phe")
    (columns,) = worker.annotate([batch], frozenset({"values"}))
    module = critic_of(worker).module
    body = AutoModel.from_pretrained(tiny_model)
    body.load_state_dict(module.body.state_dict())
    head = module.value_head
    for row in range(batch.num_rows):
        start, end = batch.row_starts[row : row + 2].tolist()
        with torch.no_grad():
            hidden = body(batch.input_ids[None, start:end]).last_hidden_state[0, :-1]
            expected = (hidden @ head.weight[0] + head.bias).detach()
        expected = expected.where(batch.source[start + 1 : end] != Source.CONTEXT, 0.0)
        assert expected.any()
        assert columns["values"][start] == 0
        torch.testing.assert_close(
            columns["values"][start + 1 : end], expected, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("zero_stage", "dtype"),
    [(0, "float32"), (1, "float32"), (2, "bfloat16"), (3, "float32"), (3, "bfloat16")],
)
def test_it_learns_and_survives_a_checkpoint(tiny_model, tmp_path, zero_stage, dtype):
    worker = make_worker(tiny_model, zero_stage=zero_stage, dtype=dtype)
    batch = make_batch()
    losses = [worker.step([batch], "critic", {}, RATE).metrics["loss"] for _ in range(3)]
    assert losses[2] < losses[0]
    saved = save_state(worker, tmp_path)
    after_save = worker.step([batch], "critic", {}, RATE)
    worker.load(saved)
    assert worker.step([batch], "critic", {}, RATE) == after_save


def test_a_checkpoint_without_a_critic_is_refused(tiny_model, tmp_path):
    grpo_like = {"main": frozenset({"old_logprobs"})}
    worker = LearnerWorker(str(tiny_model), LearnerConfig(), ALGORITHM.losses, grpo_like, Rank())  # pyright: ignore[reportArgumentType]
    saved = save_state(worker, tmp_path)
    with pytest.raises(CheckpointError, match="critic"):
        make_worker(tiny_model).load(saved)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_policy_and_critic_do_not_move_each_other(tiny_model, tmp_path, zero_stage):
    worker = make_worker(tiny_model, zero_stage=zero_stage)
    batch = make_batch()
    batch = replace(batch, old_logprobs=batch.rollout_logprobs.nan_to_num())
    sequence = [5, 9, 200, 31, 7]

    def values():
        return worker.annotate([batch], frozenset({"values"}))[0]["values"]

    before = worker.logprobs([sequence])
    worker.step([batch], "critic", {}, RATE)
    assert worker.logprobs([sequence]) == before
    critic = values()
    worker.step([batch], "main", {}, RATE)
    assert worker.logprobs([sequence]) != before
    assert torch.equal(values(), critic)
    worker.export(str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([sequence])
    with torch.no_grad():
        theirs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    ours = torch.tensor(worker.logprobs([sequence])[0])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_with_lora_the_critic_trains_adapters_and_its_head(tiny_model):
    worker = make_worker(tiny_model, parameter_selection=LoraConfig(type="lora", rank=4))
    names = {n for n, p in critic_of(worker).module.named_parameters() if p.requires_grad}
    assert {"value_head.weight", "value_head.bias"} < names
    assert all("lora_" in name or name.startswith("value_head.") for name in names)
    losses = [worker.step([make_batch()], "critic", {}, RATE).metrics["loss"] for _ in range(3)]
    assert losses[2] < losses[0]


def test_gradients_are_clipped_on_their_own(tiny_model):
    """The first step moves the head by AdamW on the clipped gradient, whatever the policy's norm is."""
    worker = make_worker(tiny_model, max_grad_norm=1e-9, weight_decay=0.0)
    report = worker.step([make_batch()], "critic", {}, 1.0)
    assert report.grad_norm > 1e-3
    # Below AdamW's epsilon of 1e-8 a step is about rate x gradient / epsilon, so clipping shows.
    assert 0 < critic_of(worker).module.value_head.bias.abs().item() < 0.2


def group_of(worker):
    return LearnerGroup(
        InProcessRank(worker),
        worker.config,
        ALGORITHM.needs,
        total_steps=10,
        seed=0,
        route=None,  # pyright: ignore[reportArgumentType]
    )


def test_each_minibatch_moves_the_policy_then_the_critic(tiny_model):
    learners = group_of(make_worker(tiny_model, learning_rate=1e-3))
    samples = tuple(make_rows("pppppp"))
    update = Update(
        samples,
        "main",
        {},
        minibatches=3,
        epochs=2,
        critic_loss="critic",
        critic_learning_rate=1e-5,
    )
    needs = ALGORITHM.needs["main"] | ALGORITHM.needs["critic"]
    batch = learners.annotate(collate(samples), needs, single=False)
    reports = learners.update(ALGORITHM.finish(batch), update, step=0)
    assert [(r.loss_name, r.model, r.learning_rate) for r in reports] == [
        ("main", "policy", 1e-3),
        ("critic", "critic", 1e-5),
    ] * 6
    assert [set(r.tokens) for r in reports[:2]] == [
        {"policy", "expert", "computed", "left_out"},
        {"critic", "computed", "left_out"},
    ]
    trained = int((batch.source == Source.POLICY).sum())
    state = RunState()
    assert state.advance(reports)
    assert state.optimizer_steps == 6
    assert state.tokens["policy"] == state.tokens["critic"] == 2 * trained


def test_a_warm_up_leaves_the_policys_version(tiny_model):
    worker = make_worker(tiny_model)
    learners = group_of(worker)
    samples = tuple(make_rows("pp"))
    before = worker.logprobs([[5, 9, 7]])
    batch = learners.annotate(collate(samples), ALGORITHM.needs["critic"], single=True)
    update = Update(samples, "critic", {}, learning_rate=1e-3)
    reports = learners.update(ALGORITHM.finish(batch), update, step=0)
    assert [report.model for report in reports] == ["critic"]
    assert worker.logprobs([[5, 9, 7]]) == before
    state = RunState()
    assert not state.advance(reports)
    assert (state.step, state.policy_version, state.optimizer_steps) == (1, 0, 0)


def test_a_penalty_in_the_reward_records_log_probs_of_a_single_update(tiny_model):
    algorithm = Ppo(PpoConfig(reward_kl_coef=0.1), Setup(Sampling(16)))
    worker = LearnerWorker(
        str(tiny_model), LearnerConfig(), algorithm.losses, algorithm.needs, Rank()
    )
    batch = collate(make_rows("pp"))
    batch = group_of(worker).annotate(batch, algorithm.needs["main"], single=True)
    assert batch.old_logprobs is not None
    torch.testing.assert_close(batch.old_logprobs, batch.ref_logprobs)
    assert algorithm.finish(batch).returns is not None
