"""F17: a state written by one number of ranks and one ZeRO stage, read by others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rows import make_rows
from safetensors.torch import load_file

from plait.algorithms import Setup
from plait.algorithms.chord import Chord, ChordConfig
from plait.engine.batch import collate
from plait.engine.config import LearnerConfig
from plait.engine.learners import LearnerGroup
from plait.engine.process_ranks import ProcessRanks
from plait.engine.types import Sampling, Update
from saved_state import save_state

RATE = 1e-2
WRITERS = [(1, 0), (2, 1), (2, 2), (2, 3)]
READERS = [(num_ranks, stage) for num_ranks in (1, 2) for stage in range(4)]
"""Learner ranks and ZeRO stage."""


class Learner:
    """Learner ranks that train on the same rows, however many they are."""

    def __init__(self, ranks: ProcessRanks, model: Path, zero_stage: Any) -> None:
        algorithm = Chord(ChordConfig(kl_coef=0.1), Setup(Sampling(16)))
        config = LearnerConfig(
            learning_rate=RATE, zero_stage=zero_stage, num_workers=ranks.world_size, num_cpus=1
        )
        ranks.start(str(model), config, algorithm.losses, algorithm.needs)
        nowhere: Any = None
        self.group = LearnerGroup(
            ranks,
            config,
            algorithm.needs,
            total_steps=9,
            seed=0,
            route=nowhere,
        )
        self.needs = algorithm.needs["main"]

    def step(self, seed: int, optimizer: Any = "main") -> float:
        """Loss of one optimizer step."""
        samples = tuple(make_rows("ppeephpe", seed=seed))
        update = Update(samples, "main", {"mu": 0.4}, optimizer=optimizer)
        batch = self.group.annotate(collate(samples), self.needs, single=True)
        (report,) = self.group.update(batch, update, step=seed)
        return report.metrics["loss"]


def whole(paths: list[str]) -> dict[str, torch.Tensor]:
    """Every tensor of a state, flat and put together, by name."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for path in paths:
        for key, tensor in load_file(path).items():
            name, cut, first = key.rpartition("@")
            pieces.setdefault(name if cut else key, {})[int(first) if cut else 0] = tensor.flatten()
    return {
        name: torch.cat([parts[first] for first in sorted(parts)]) for name, parts in pieces.items()
    }


@pytest.fixture(scope="module")
def ranks():
    """Processes of one and of two ranks."""
    both = {n: ProcessRanks(n, 300.0) for n in (1, 2)}
    yield both
    for processes in both.values():
        processes.close()


@pytest.mark.long
def test_f17_any_number_of_ranks_and_any_stage_reads_it(tiny_model, tmp_path, ranks, measured):
    written, losses = {}, {}
    for num_ranks, stage in WRITERS:
        learner = Learner(ranks[num_ranks], tiny_model, stage)
        for seed in range(2):
            learner.step(seed)
            learner.step(seed, "expert")
        learner.group.refresh_reference()
        learner.step(2)
        paths = save_state(learner.group, tmp_path / f"{num_ranks}-{stage}")
        written[num_ranks, stage] = paths
        losses[num_ranks, stage] = [learner.step(3), learner.step(4, "expert")]
    worst = 0.0
    for number, (num_ranks, stage) in enumerate(READERS):
        learner = Learner(ranks[num_ranks], tiny_model, stage)
        for source, paths in written.items():
            learner.group.load(paths)
            folder = tmp_path / f"again-{number}-{source[0]}-{source[1]}"
            again = whole(save_state(learner.group, folder))
            before = whole(paths)
            assert before.keys() == again.keys()
            for name, tensor in before.items():
                assert torch.equal(tensor, again[name]), (source, (num_ranks, stage), name)
            found = [learner.step(3), learner.step(4, "expert")]
            gaps = [abs(a - b) for a, b in zip(found, losses[source], strict=True)]
            assert max(gaps) <= 1e-6, (source, (num_ranks, stage), gaps)
            if source == (num_ranks, stage):
                assert max(gaps) == 0.0
            worst = max(worst, *gaps)
    pairs = len(written) * len(READERS)
    measured("F17", f"{pairs} pairs of ranks and stage: max difference 0, next losses {worst:.0e}")
