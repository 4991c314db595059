"""One step of a method on input that is wrong somewhere: a prompt, its rollouts, its demonstration, to losses."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from typing import Any

import torch

from plait.algorithms import ALGORITHMS, AlgorithmBase
from plait.engine.batch import collate
from plait.engine.metrics import step_metrics
from plait.engine.run_state import RunState
from plait.engine.types import (
    Demonstration,
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


def build(name: str, **config: Any) -> AlgorithmBase:
    cls = ALGORITHMS[name]
    values = {"type": name, "max_response_length": 12, **CONFIGS.get(name, {}), **config}
    if "rollouts_per_prompt" in cls.Config.model_fields:
        values["rollouts_per_prompt"] = SIZE
    return cls(cls.Config.model_validate(values), SETUP)


def graded(prompt: Prompt) -> Prompt:
    right = tuple(replace(d, score=Score.ok(1.0)) for d in prompt.demonstrations)
    return replace(prompt, demonstrations=right)


def take_step(
    name: str,
    rewards: list[float | None],
    *,
    demonstrated: bool = True,
    step: int = 1,
    demonstration: Demonstration | None = None,
    **config: Any,
) -> tuple[list[Update], list[RolloutGroup]]:
    """One prompt, as many of `rewards` as it has rollouts; sasr is in its RL half."""
    algorithm = build(name, **config)
    if name == "sasr":
        algorithm.load_state_dict({"warmup_norm": 1.0, "last_norm": 0.0, "num_sft": 1, "num_rl": 0})
    prompt = make_prompt("a", demonstrated)
    if demonstration is not None:
        prompt = replace(prompt, demonstrations=(demonstration,))
    prompt = graded(prompt)
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
