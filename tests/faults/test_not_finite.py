"""F28: a loss or gradient that is not finite changes nothing on any rank, is counted, and ends the run after K."""

from __future__ import annotations

import multiprocessing
import queue
from contextlib import suppress
from typing import Any

import pytest
import torch
from two_ranks import WAYS, work

from plait.algorithms import Setup
from plait.algorithms.chord import Chord, ChordConfig
from plait.engine.batch import collate
from plait.engine.config import LearnerConfig
from plait.engine.errors import LearnerError
from plait.engine.learner import LearnerWorker, Rank, WeightRoute
from plait.engine.learners import InProcessRank, LearnerGroup
from plait.engine.metrics import report_metrics
from plait.engine.rendezvous import free_port
from plait.engine.run_state import RunState
from plait.engine.types import Sampling, Update

SETTINGS: list[dict[str, Any]] = [
    *({"zero_stage": stage} for stage in range(4)),
    *({"zero_stage": stage, "dtype": "bfloat16"} for stage in (1, 2, 3)),
    {"zero_stage": 2, "parameter_selection": {"type": "half", "redraw_steps": 1}},
]


@pytest.fixture(scope="module")
def both(tiny_model) -> list[list[dict[str, Any]]]:
    """What each of two ranks says of each setting."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    port = free_port()
    processes = [
        context.Process(
            target=work, args=(str(tiny_model), SETTINGS, Rank(i, 2, port=port), answers)
        )
        for i in range(2)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    while len(found) < 2:
        assert not any(process.exitcode for process in processes)
        with suppress(queue.Empty):
            found |= [answers.get(timeout=1)]
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    return [found[0], found[1]]


def test_f28_no_rank_moves_a_bit(both, measured):
    for one, other, settings in zip(*both, SETTINGS, strict=True):
        for way in WAYS:
            wanted = "loss" if way.startswith("loss") else "gradient"
            for rank in (one, other):
                assert wanted in rank["skipped"][way], (settings, way)
                assert rank["after"][way] == rank["before"], (settings, way)
            assert one["skipped"][way] == other["skipped"][way]
        # The next step is taken as if nothing had happened, and both ranks still hold the same weights.
        assert one["good"] == other["good"]
        assert one["good"][0] == ""
        assert one["moved"]
        assert one["logprobs"] == other["logprobs"]
    number = len(WAYS) * len(SETTINGS)
    measured("F28", f"changed bits 0, ranks apart 0 in {number}/{number} broken steps on 2 ranks")


@pytest.fixture
def group(tiny_model):
    def make(max_skipped: int) -> LearnerGroup:
        algorithm = Chord(ChordConfig(), Setup(Sampling(16)))
        config = LearnerConfig(learning_rate=1e-2, max_skipped_updates=max_skipped)
        worker = LearnerWorker(str(tiny_model), config, algorithm.losses, algorithm.needs, Rank())
        route = WeightRoute("shared_memory", "float32", 10.0)
        return LearnerGroup(
            InProcessRank(worker), config, algorithm.needs, total_steps=9, seed=0, route=route
        )

    return make


def rows(broken: bool) -> Update:
    from rows import make_rows

    found = make_rows("pppp")
    if broken:
        for row in found:
            row.advantages[row.source == 1] = torch.inf
    return Update(tuple(found), "main", {"mu": 0.4})


def run(learners: LearnerGroup, update: Update, step: int, **hooks: Any) -> list[Any]:
    batch = learners.annotate(collate(update.samples), learners.needs["main"], single=True)
    return learners.update(batch, update, step=step, **hooks)


def test_f28_k_in_a_row_end_the_run_and_name_the_prompts(group, measured):
    learners = group(3)
    remembered = []
    for step in range(2):
        (report,) = run(learners, rows(broken=True), step, remember=remembered.append)
        assert not report.applied
    (report,) = run(learners, rows(broken=False), 2, remember=remembered.append)
    assert report.applied
    assert len(remembered) == 1, "what was not trained is not remembered"
    for step in (3, 4):
        run(learners, rows(broken=True), step)
    with pytest.raises(LearnerError) as caught:
        run(learners, rows(broken=True), 5)
    text = str(caught.value)
    for part in ("policy_loss", "update 'main' of step 6", "group0, group1", "max_skipped_updates"):
        assert part in text
    measured("F28", "stopped after K = 3 in a row, naming loss, step and prompts")


def test_a_learner_that_starts_again_counts_anew(group, monkeypatch):
    """As a resumed run does: the steps after the checkpoint are taken, and counted, once more."""
    learners = group(3)
    monkeypatch.setattr(learners.ranks, "restart", lambda: None)
    for _ in range(2):
        for step in range(2):
            run(learners, rows(broken=True), step)
        learners.restart()


def test_f28_skipped_steps_are_counted_and_nothing_else(group):
    learners = group(9)
    (bad,) = run(learners, rows(broken=True), 0)
    (good,) = run(learners, rows(broken=False), 0)
    metrics = report_metrics([bad, good])
    assert metrics["updates/skipped"] == 1
    assert metrics["main/optimizer_steps"] == 1
    assert metrics["main/grad_norm"] == good.grad_norm
    assert metrics["tokens/policy"] == good.tokens["policy"]
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())
    state = RunState()
    assert not state.advance([bad])
    assert state.advance([bad, good])
    assert (state.skipped_updates, state.optimizer_steps, state.policy_version) == (2, 1, 1)
