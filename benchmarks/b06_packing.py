"""B6: how much of what the learner computes is padding, how even the ranks' shares are, and what packing changes.

Counted from the micro-batches that LearnerGroup hands to its ranks, with response lengths as models write them. The
linear share is tokens; the quadratic one, of attention, counts tokens x the tokens before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from figures import at_least, at_most
from harness import Session
from plait.algorithms import Setup
from plait.algorithms.grpo import Grpo, GrpoConfig
from plait.engine.batch import collate, select
from plait.engine.config import LearnerConfig
from plait.engine.learner import LearnerWorker, Rank, WeightRoute
from plait.engine.learners import LearnerGroup
from plait.engine.packing import BLANK_TOKENS
from plait.engine.shared_prefix import lay_out
from plait.engine.types import Sample, Sampling, TrainBatch, Update, UpdateReport
from shapes import lengths_like_answers, make_groups

ALGORITHM = Grpo(GrpoConfig(), Setup(Sampling(512)))
RANKS, BUDGET = 4, 2048


class Listening:
    """Ranks that only keep what they are asked to compute."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.shares: list[Sequence[TrainBatch]] = []

    def call(self, method: str, per_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        assert method == "step", method
        self.shares = [arguments[0] for arguments in per_rank]
        return [UpdateReport("main", 1.0, {}, 0.0)] * self.world_size

    def restart(self) -> None:
        """There is nothing to restart."""

    def status(self) -> Sequence[Any]:
        return ()

    def close(self) -> None:
        """Nothing is held."""


def shares_of(rows: Sequence[Sample], *, shared: bool) -> list[Sequence[TrainBatch]]:
    """Micro-batches of each rank for one optimizer step; `shared`: prompts of a group are computed once."""
    listening = Listening(RANKS)
    config = LearnerConfig(
        num_workers=RANKS, max_tokens_per_micro_batch=BUDGET, share_prefixes=shared
    )
    route = WeightRoute("shared_memory", "float32", 1.0)
    group = LearnerGroup(listening, config, ALGORITHM.needs, total_steps=1, seed=0, route=route)
    group.update(collate(rows), Update(tuple(rows), "main", {}), step=0)
    return listening.shares


def computed(micro_batch: TrainBatch) -> int:
    """Tokens of the forward pass; an empty micro-batch computes a blank row."""
    if not micro_batch.num_rows:
        return BLANK_TOKENS
    stretches = lay_out(micro_batch)
    return micro_batch.num_tokens if stretches is None else sum(stretches.lengths)


def quadratic(micro_batch: TrainBatch) -> int:
    return int((micro_batch.row_starts.diff() ** 2).sum())


def unevenness(loads: Sequence[float]) -> float:
    return max(loads) / (sum(loads) / len(loads))


def measure(session: Session) -> None:
    lengths = lengths_like_answers(0, 512, mean=96, cap=512)
    useful, sharing, tokens, squares, naive = [], [], [], [], []
    for seed in range(5):
        rows = make_groups(seed, num_prompts=64, group_size=8, prompt_tokens=128, lengths=lengths)
        asked = sum(map(len, rows))
        shares = shares_of(rows, shared=False)
        useful.append(asked / sum(computed(one) for share in shares for one in share))
        naive.append(asked / (len(rows) * max(map(len, rows))))
        shares = shares_of(rows, shared=True)
        loads = [sum(map(computed, share)) for share in shares]
        sharing.append(asked / sum(loads))
        tokens.append(unevenness(loads))
        squares.append(unevenness([sum(map(quadratic, share)) for share in shares]))
    what = f"512 rows in 64 groups, {RANKS} ranks, {BUDGET} tokens a micro-batch"
    padded = f"{what}; one padded rectangle: {sum(naive) / 5:.2f}"
    session.derive("useful / computed tokens", useful, target=at_least(0.98), note=padded)
    session.derive("the same, each prompt once where its rows meet", sharing, note=what)
    session.derive("max / mean computed tokens over ranks", tokens, target=at_most(1.02), note=what)
    session.derive("max / mean squared lengths over ranks", squares, note=what)
    with TemporaryDirectory() as folder:
        session.count(
            "largest difference of a gradient, packed against padded",
            packed_against_padded(Path(folder)),
            target=at_most(1e-6),
            note="float32, every parameter of a tiny Llama",
        )


def packed_against_padded(folder: Path) -> float:
    from tiny_model import make_tiny_model

    model = make_tiny_model(folder)
    lengths = lengths_like_answers(1, 16, mean=24, cap=96)
    batch = collate(make_groups(9, num_prompts=4, group_size=4, prompt_tokens=12, lengths=lengths))
    found = []
    for packing in (True, False):
        config = LearnerConfig(packing=packing)
        worker = LearnerWorker(str(model), config, ALGORITHM.losses, ALGORITHM.needs, Rank())
        half = batch.num_rows // 2
        cut = [select(batch, range(half)), select(batch, range(half, batch.num_rows))]
        found.append(worker.gradients(cut if packing else [batch], "main", {})[1])
    packed, padded = found
    return max(float((packed[name] - padded[name]).abs().max()) for name in padded)
