"""What data and verifiers get wrong, through hybrids, sft and grpo: finite losses, right counts, seen in metrics."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from typing import Any

import pytest
import torch

from plait.algorithms import ALGORITHMS, AlgorithmBase
from plait.engine.batch import collate
from plait.engine.checkpoint import RunState
from plait.engine.metrics import step_metrics
from plait.engine.types import (
    PolicyOutput,
    Prompt,
    RolloutGroup,
    Score,
    TokenSamples,
    TrainBatch,
    Update,
)
from steps import SETUP, answer, make_prompt

HYBRIDS = (
    "chord",
    "hpt",
    "luffy",
    "one_token_rollout",
    "prefix_rft",
    "relift",
    "sasr",
    "srft",
    "uft",
)
METHODS = (*HYBRIDS, "super_rl", "visurf", "sft", "grpo")
ROLLING = tuple(name for name in METHODS if name not in ("one_token_rollout", "sft"))
CONFIGS: dict[str, dict[str, Any]] = {
    "chord": {"expert_rows_per_step": 2},
    "relift": {"expert_batch_size": 1},
    "sasr": {"warmup_steps": 1, "kl_coef": 0.0},
}
SIZE = 4
"""Rollouts a prompt; each has two tokens."""


def build(name: str) -> AlgorithmBase:
    cls = ALGORITHMS[name]
    values = {"type": name, "max_response_length": 12, **CONFIGS.get(name, {})}
    if "rollouts_per_prompt" in cls.Config.model_fields:
        values["rollouts_per_prompt"] = SIZE
    return cls(cls.Config.model_validate(values), SETUP)


def graded(prompt: Prompt) -> Prompt:
    right = tuple(replace(d, score=Score.ok(1.0)) for d in prompt.demonstrations)
    return replace(prompt, demonstrations=right)


def take_step(
    name: str, rewards: list[float | None], *, demonstrated: bool = True, step: int = 1
) -> tuple[list[Update], list[RolloutGroup]]:
    """One prompt, as many of `rewards` as it has rollouts; sasr is in its RL half."""
    algorithm = build(name)
    if name == "sasr":
        algorithm.load_state_dict({"warmup_norm": 1.0, "last_norm": 0.0, "num_sft": 1, "num_rl": 0})
    prompt = graded(make_prompt("a", demonstrated))
    plan = algorithm.plan([prompt], [prompt] if demonstrated and name == "chord" else [], step)
    groups = answer(plan.requests, {"a": []}) if not plan.requests else []
    if plan.requests:
        num = sum(request.n for request in plan.requests)
        groups = [score(group, rewards[:num]) for group in answer_all(plan.requests)]
    return list(algorithm.assemble(plan, groups, step)), groups


def answer_all(requests: Any) -> list[RolloutGroup]:
    total = sum(request.n for request in requests)
    return answer(requests, {"a": [0.0] * total})


def score(group: RolloutGroup, rewards: list[float | None]) -> RolloutGroup:
    scores = [Score.unknown("deadline") if r is None else Score.ok(r) for r in rewards]
    return replace(group, scores=tuple(scores))


def columns(batch: TrainBatch) -> TrainBatch:
    """What the no-grad pass records."""
    torch.manual_seed(1)
    noise = torch.randn(batch.num_tokens) * 0.1 - 2
    return replace(batch, old_logprobs=noise, ref_logprobs=noise - 0.1, old_entropy=noise.abs())


def solve(name: str, update: Update) -> tuple[TrainBatch, float]:
    """The update as one minibatch; asserts that loss, metrics and gradient are finite."""
    algorithm = build(name)
    batch = algorithm.finish(columns(collate(update.samples)))
    torch.manual_seed(2)
    logprobs = (torch.randn(batch.num_tokens) * 0.1 - 2).where(batch.trained, 0.0)
    logprobs.requires_grad_()
    entropy, rate = logprobs.square(), torch.full_like(logprobs, 0.25)
    samples = TokenSamples(rate, logprobs * rate, logprobs * (1 - rate))
    batch = algorithm.prepare(batch, logprobs.detach(), update.coefs)
    out = PolicyOutput(logprobs, entropy, samples=samples)
    result = algorithm.losses[update.loss](out, batch, update.coefs)
    result.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
    assert result.loss.isfinite()
    assert all(isfinite(float(value)) for value in result.metrics.values())
    return batch, float(logprobs.grad.abs().sum())


def measure(updates: list[Update], groups: list[RolloutGroup]) -> dict[str, float]:
    return step_metrics(RunState(), [groups] if groups else [], updates, [], {})


@pytest.mark.parametrize("rewards", [[0.0] * SIZE, [1.0] * SIZE], ids=["wrong", "right"])
@pytest.mark.parametrize("name", ROLLING)
def test_equal_rewards(name, rewards):
    updates, groups = take_step(name, rewards)
    for update in updates:
        solve(name, update)
    metrics = measure(updates, groups)
    assert metrics["groups/uniform"] == 1
    assert metrics["groups/all_wrong"] == (rewards[0] == 0)


@pytest.mark.parametrize("name", ROLLING)
def test_a_group_of_one_known_score(name):
    updates, groups = take_step(name, [1.0, None, None, None])
    for update in updates:
        solve(name, update)
    metrics = measure(updates, groups)
    assert metrics["groups/single"] == metrics["groups/partly_unknown"] == 1
    assert metrics["groups/unknown"] == 0


@pytest.mark.parametrize("name", ROLLING)
def test_unknown_for_some_leaves_the_others(name):
    updates, groups = take_step(name, [1.0, None, 0.0, 1.0])
    unknown = sum(s.reward is None for group in groups for s in group.scores)
    known = sum(s.reward is not None for group in groups for s in group.scores)
    batch, _ = solve(name, updates[0])
    assert batch.denom.policy_rows == known
    assert batch.denom.policy_tokens == 2 * known
    assert measure(updates, groups)["reward/unknown"] == unknown == 1


@pytest.mark.parametrize("name", ROLLING)
def test_unknown_for_all_trains_no_rollout(name):
    updates, groups = take_step(name, [None] * SIZE)
    for update in updates:
        batch, _ = solve(name, update)
        assert batch.denom.policy_tokens == 0
    metrics = measure(updates, groups)
    assert metrics["groups/unknown"] == 1
    assert "reward/mean" not in metrics
    # chord's stream of demonstrations does not depend on the rollouts.
    assert metrics["updates/untrained"] == (0 if name == "chord" else 1)
    assert metrics["rows/trained"] == (1 if name == "chord" else 0)


@pytest.mark.parametrize("name", [n for n in ROLLING if n != "sasr"])
def test_without_expert_rows(name):
    updates, groups = take_step(name, [1.0, 0.0, 0.0, 1.0], demonstrated=False)
    (update,) = updates
    batch, moved = solve(name, update)
    assert (batch.denom.expert_tokens, batch.denom.expert_rows) == (0, 0)
    assert (batch.denom.policy_tokens, batch.denom.policy_rows) == (2 * SIZE, SIZE)
    assert moved > 0
    assert measure(updates, groups)["rows/expert"] == 0


@pytest.mark.parametrize("name", ["sft", "one_token_rollout", "hpt", "super_rl", "sasr"])
def test_with_only_expert_rows(name):
    updates, groups = take_step(name, [0.0] * SIZE, step=0 if name == "sasr" else 1)
    (update,) = updates
    batch, moved = solve(name, update)
    assert (batch.denom.policy_tokens, batch.denom.policy_rows) == (0, 0)
    assert (batch.denom.expert_tokens, batch.denom.expert_rows) == (7, 1)
    assert moved > 0
    assert measure(updates, groups)["rows/expert"] == 1


@pytest.mark.parametrize("name", METHODS)
def test_fully_masked_rows_train_nothing_and_are_counted(name):
    updates, groups = take_step(name, [1.0, 0.0, 0.0, 1.0])
    masked = [
        replace(u, samples=tuple(replace(s, weights=s.weights * 0) for s in u.samples))
        for u in updates
    ]
    for update in masked:
        batch, moved = solve(name, update)
        assert batch.denom.tokens == batch.denom.rows == 0
        assert moved == 0
    metrics = measure(masked, groups)
    assert metrics["rows/trained"] == 0
    assert metrics["rows/untrained"] == sum(len(update.samples) for update in masked)
    assert metrics["updates/untrained"] == len(masked)
