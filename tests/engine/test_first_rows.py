"""Demonstrations that train while the step's rollouts are drawn: the same gradient as after them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from in_process_run import Dice, believe, everything, parts_of, sections
from rows import make_rows

from end_to_end.command_line import no_verifier, tiny_recipe, write_parity, write_recipe
from end_to_end.test_every_algorithm import CONFIGS
from plait.algorithms import Setup
from plait.algorithms.chord import Chord, ChordConfig
from plait.engine import loop
from plait.engine.batch import collate
from plait.engine.config import LearnerConfig
from plait.engine.errors import LearnerError
from plait.engine.learner import LearnerWorker, Rank
from plait.engine.learners import InProcessRank, LearnerGroup
from plait.engine.types import Demonstration, Prompt, Rollout, Sampling, StepPlan, Update
from plait.launch.config import load_recipe

COEFS = {"mu": 0.4}
KINDS = "ppepepe"
CONFIGS_OF_LOSSES: dict[str, dict[str, Any]] = {
    "tokens": {},
    "rows": {"normalizer": "rows", "expert_normalizer": "rows"},
    "constant": {"normalizer": "constant", "expert_normalizer": "constant"},
    "phi": {"expert_loss": {"type": "phi"}},
}


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
    chords = {
        name: Chord(ChordConfig(max_response_length=16, **fields), Setup(Sampling(16)))
        for name, fields in CONFIGS_OF_LOSSES.items()
    }
    losses = {name: chord.losses["main"] for name, chord in chords.items()}
    needs = {name: chord.needs["main"] for name, chord in chords.items()}
    config = LearnerConfig(max_tokens_per_micro_batch=40)
    return LearnerWorker(str(tiny_model), config, losses, needs, Rank())


@pytest.fixture
def samples():
    rows = [row.with_advantage((-1.0) ** i * (0.3 + i)) for i, row in enumerate(make_rows(KINDS))]
    return tuple(replace(row, group_id=f"g{i}") for i, row in enumerate(rows))


def group(worker) -> tuple[MeasuringRank, LearnerGroup]:
    ranks, route = MeasuringRank(worker), None
    return ranks, LearnerGroup(
        ranks,
        worker.config,
        worker.needs,
        total_steps=9,
        seed=0,
        route=route,  # pyright: ignore[reportArgumentType]
    )


def experts(samples: Any) -> tuple[Any, ...]:
    return tuple(row for row, kind in zip(samples, KINDS, strict=True) if kind == "e")


@pytest.mark.parametrize("name", CONFIGS_OF_LOSSES)
def test_the_gradient_and_the_figures_are_those_of_all_rows_at_once(worker, samples, name):
    batch, update = collate(samples), Update(samples, name, COEFS)
    ranks, learners = group(worker)
    (expected,), gradient = learners.update(batch, update, step=0), ranks.gradient
    learners.begin(collate(experts(samples)), Update(experts(samples), name, COEFS))
    (found,) = learners.update(batch, update, step=0)
    assert ranks.gradient.keys() == gradient.keys()
    for parameter, value in gradient.items():
        scale = value.abs().max()
        assert torch.allclose(ranks.gradient[parameter], value, atol=1e-6 * float(scale), rtol=1e-5)
    uneven = {"rank_imbalance"}
    assert found.metrics.keys() == expected.metrics.keys()
    for key in expected.metrics.keys() - uneven:
        assert found.metrics[key] == pytest.approx(expected.metrics[key], rel=1e-5), key
    trained = {key: found.tokens[key] for key in ("policy", "expert", "left_out")}
    assert trained == {key: expected.tokens[key] for key in trained}


def test_rows_that_the_update_does_not_hold_are_an_error(worker, samples):
    batch = collate(samples)
    for begun, coefs in (
        (experts(samples)[:-1], COEFS),
        (experts(samples), {"mu": 0.5}),
        (tuple(replace(row, weights=row.weights * 2) for row in experts(samples)), COEFS),
    ):
        _, learners = group(worker)
        learners.begin(collate(begun), Update(begun, "tokens", coefs))
        with pytest.raises(LearnerError, match="rows that were begun"):
            learners.update(batch, Update(samples, "tokens", COEFS), step=0)
        worker.engine.discard()
        worker._begun = {}


def test_chord_begins_where_no_denominator_is_shared():
    prompt = Prompt("p", (), (3, 4), demonstrations=(Demonstration((5, 6), "5 6"),))
    plan = StepPlan(experts=(prompt,))

    def begins(**fields: Any) -> bool:
        chord = Chord(ChordConfig(max_response_length=16, **fields), Setup(Sampling(16)))
        return chord.first_rows(plan, 0) is not None

    assert begins()
    assert begins(entropy_coef=0.1)
    assert not begins(entropy_coef=0.1, entropy_scope="all")
    assert not begins(kl_coef=0.1), "reference log-probs are annotated with the whole batch"


class Waits(Dice):
    """The first sample of a step comes only when its demonstrations have trained."""

    begun = threading.Event()

    def generate(self, requests: Any, *, step: int) -> Iterator[Rollout]:
        for number, rollout in enumerate(super().generate(requests, step=step)):
            if number == 0 and requests[0].n > 1:  # no evaluation
                assert self.begun.wait(60), "nothing trained while the samplers worked"
                self.begun.clear()
            yield rollout


def test_they_train_while_the_samplers_work_with_the_same_bits(tiny_model, tmp_path, monkeypatch):
    rows = [{"prompt": f"{i} + 1 =", "answer": "1", "demonstration": "So 1."} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_parity(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "sync", believe)
    begin = LearnerGroup.begin

    def notify(self: Any, *arguments: Any) -> None:
        begin(self, *arguments)
        Waits.begun.set()

    monkeypatch.setattr(LearnerGroup, "begin", notify)
    found = []
    for name, pool in (("plain", Dice()), ("waits", Waits())):
        Waits.begun.clear()
        recipe = tiny_recipe(
            tiny_model,
            run={"name": name, "deterministic": True},
            reward=no_verifier("parity:grade"),
            loop={"steps": 3, "prompts_per_step": 2},
            eval={"num_prompts": 2},
        )
        recipe["algorithm"] = sections("chord", CONFIGS)
        loaded = load_recipe(tmp_path / write_recipe(tmp_path, f"{name}.yaml", recipe))
        with parts_of(loaded, pool, tiny_model) as parts:
            loop.train(loaded.loop, loaded.eval, loaded.sampling, parts)
        found.append(everything(loaded.folder))
    assert found[0] == found[1]
