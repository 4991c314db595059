"""The expert ledger: which demonstrations trained, why others did not, and what both sources pull at."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rows import make_rows

from plait.algorithms import Setup
from plait.algorithms.chord import Chord, ChordConfig
from plait.algorithms.ghpo import Ghpo, GhpoConfig
from plait.algorithms.grpo import Grpo, GrpoConfig
from plait.algorithms.hpt import Hpt, HptConfig
from plait.algorithms.prefix_rft import PrefixRft, PrefixRftConfig
from plait.algorithms.relift import Relift, ReliftConfig
from plait.algorithms.super_rl import SuperRl, SuperRlConfig
from plait.engine.batch import collate
from plait.engine.config import LearnerConfig
from plait.engine.learner import LearnerWorker, Rank, WeightRoute
from plait.engine.learners import InProcessRank, LearnerGroup
from plait.engine.ledger import expert_ledger
from plait.engine.loop import Parts, measure_gradients
from plait.engine.types import (
    Demonstration,
    Prompt,
    Rollout,
    RolloutGroup,
    Sampling,
    Score,
    Source,
    StepPlan,
)

SETUP = Setup(Sampling(16))
PREFIX = "ledger/demonstrations_unused/"


def prompt(name, demonstration: tuple[int, ...] | None = (5, 6, 2)):
    found = () if demonstration is None else (Demonstration(demonstration, "56"),)
    return Prompt(name, ({"role": "user", "content": "?"},), (3, 4), "4", demonstrations=found)


def group(of, *rewards):
    rollouts = tuple(
        Rollout(of.prompt_id, i, (7, 8, 2), 0, (-1.0,) * 3, 0, "stop", "x")
        for i in range(len(rewards))
    )
    scores = tuple(Score.unknown("timeout") if r is None else Score.ok(r) for r in rewards)
    return RolloutGroup(of, rollouts, scores)


SOLVED, FAILED, BARE, SILENT = prompt("solved"), prompt("failed"), prompt("bare", None), prompt("s")
GROUPS = [group(SOLVED, 1, 0), group(FAILED, 0, 0), group(BARE, 0, 0), group(SILENT, None, None)]
PROMPTS = [g.prompt for g in GROUPS]


def ledger(algorithm, step=0):
    updates = algorithm.assemble(StepPlan(), GROUPS, step)
    return expert_ledger(algorithm, PROMPTS, GROUPS, updates, step, max_tokens=16)


@pytest.mark.parametrize("algorithm", [Hpt(HptConfig(), SETUP), SuperRl(SuperRlConfig(), SETUP)])
def test_a_gate_and_its_reasons(algorithm):
    found = ledger(algorithm)
    assert found["ledger/demonstrations_used"] == 0.25
    assert found[f"{PREFIX}solved"] == 0.25
    assert found[f"{PREFIX}no_demonstration"] == 0.25
    assert found[f"{PREFIX}unknown_score"] == 0.25
    shares = [v for k, v in found.items() if k.startswith("ledger/demonstrations_u")]
    assert sum(shares) == 1
    assert found["ledger/demonstrations_cut"] == 0
    assert found["ledger/gate_rate"] == pytest.approx(1 / 3)


def test_a_buffer_is_told_from_use_and_an_earlier_prompt_is_not_of_this_step():
    algorithm = Relift(ReliftConfig(expert_batch_size=2), SETUP)
    found = ledger(algorithm)
    assert found["ledger/buffer_size"] == 1
    assert found["ledger/demonstrations_used"] == 0
    assert found[f"{PREFIX}buffered"] == 0.25
    algorithm.buffer = [prompt("earlier")]
    found = ledger(algorithm)
    assert found["ledger/buffer_size"] == 0
    assert found["ledger/demonstrations_used"] == 0.25
    assert found["ledger/demonstrations_of_earlier_steps"] == 1


def test_a_demonstration_too_short_for_a_prefix():
    algorithm = PrefixRft(PrefixRftConfig(rollouts_per_prompt=2), SETUP)
    prompts = [prompt("short", (2,)), prompt("long")]
    plan = algorithm.plan(prompts, (), 0)
    assert [bool(r.prefix) for r in plan.requests] == [False, False, True]
    updates = algorithm.assemble(plan, [], 0)
    found = expert_ledger(algorithm, prompts, [], updates, 0, max_tokens=2)
    assert found["ledger/demonstrations_cut"] == 0.5
    assert found[f"{PREFIX}too_short"] == 0.5
    assert found[f"{PREFIX}not_planned"] == 0.5


def test_a_hint_counts_as_use_though_no_token_of_it_trains():
    algorithm = Ghpo(GhpoConfig(), SETUP)
    hinted = [
        replace(
            g, rollouts=tuple(replace(r, prefix_len=1, logprobs=(-1.0,) * 2) for r in g.rollouts)
        )
        for g in GROUPS[1:2]
    ]
    groups = [*GROUPS, *hinted]
    updates = algorithm.assemble(StepPlan(), groups, 0)
    found = expert_ledger(algorithm, PROMPTS, groups, updates, 0, max_tokens=16)
    assert found["ledger/demonstrations_used"] == found["ledger/gate_rate"] == 0.25
    assert found[f"{PREFIX}solved"] == 0.25
    assert not any((s.source == Source.EXPERT).any() for u in updates for s in u.samples)


def test_a_method_without_demonstrations_keeps_no_ledger():
    assert ledger(Grpo(GrpoConfig(), SETUP)) == {}


def test_the_mixing_coefficient_is_that_of_the_update():
    algorithm = Chord(ChordConfig(), SETUP)
    assert ledger(algorithm)["ledger/expert_coef"] == 0.9
    assert ledger(algorithm, step=1000)["ledger/expert_coef"] == pytest.approx(0.05)


@pytest.fixture(scope="module")
def parts(tiny_model):
    algorithm = Chord(ChordConfig(), SETUP)
    worker = LearnerWorker(
        str(tiny_model), LearnerConfig(), algorithm.losses, algorithm.needs, Rank()
    )
    route = WeightRoute("shared_memory", "float32", 10.0)
    learners = LearnerGroup(
        InProcessRank(worker), worker.config, worker.needs, total_steps=9, seed=0, route=route
    )
    log = SimpleNamespace(phase=lambda name: nullcontext())
    nothing = cast(Any, None)
    rest: dict[str, Any] = {"data": nothing, "rollouts": nothing, "scorer": nothing}
    rest |= {"checkpoints": nothing, "probes": (), "tolerance": nothing, "log": log}
    return Parts(algorithm=algorithm, learners=learners, **rest)


def measure(parts, *updates):
    return measure_gradients(parts, updates, 0, by_source=True)


def test_gradients_of_both_sources_of_a_step(parts):
    update = parts.algorithm.update(make_rows("ppephe"), {"mu": 0.4})
    found = measure(parts, update)
    assert found.keys() == {
        "ledger/expert_gradient_norm",
        "ledger/policy_gradient_norm",
        "ledger/expert_gradient_share",
        "ledger/gradient_cosine",
    }
    expert, policy = found["ledger/expert_gradient_norm"], found["ledger/policy_gradient_norm"]
    assert found["ledger/expert_gradient_share"] == pytest.approx(expert / (expert + policy))
    cosine = found["ledger/gradient_cosine"]
    report, gradients = parts.learners.ranks.worker.gradients(
        [collate(update.samples)],
        "main",
        update.coefs,
    )
    whole = torch.cat([g.flatten() for g in gradients.values()]).double().norm().item()
    by_parts = expert**2 + policy**2 + 2 * expert * policy * cosine
    assert by_parts**0.5 == pytest.approx(whole, rel=1e-5)
    assert report.grad_norm == pytest.approx(whole, rel=1e-5)


def test_sources_that_train_in_separate_updates_are_compared_too(parts):
    rl = parts.algorithm.update(make_rows("ppp"), {"mu": 0.0})
    sft = parts.algorithm.update(make_rows("ee", seed=1), {"mu": 1.0})
    found = measure(parts, rl, sft)
    assert -1 < found["ledger/gradient_cosine"] < 1


def test_one_source_alone_has_a_norm_and_nothing_to_compare_with(parts):
    found = measure(parts, parts.algorithm.update(make_rows("ee"), {"mu": 1.0}))
    assert found.keys() == {"ledger/expert_gradient_norm"}
    assert measure(parts) == {}
