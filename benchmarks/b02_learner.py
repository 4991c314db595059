"""B2: the learner against a bare PyTorch loop on the same packed micro-batches, with the same loss and optimizer.

The learner is the one of a run: ranks in Ray actors, so that cutting and sending the batch, log-probs, diagnostics,
reports and ZeRO are all in its time. Prompts of a group are computed for every row, as in the bare loops. These get
micro-batches that are cut already: one loop in this process, and two under DistributedDataParallel over gloo, one
thread each, in actors as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch

from bare_loop import ALGORITHM, BareLoop, cut
from figures import at_least
from harness import Session, Side, Work
from plait.engine.batch import collate
from plait.engine.config import LearnerConfig
from plait.engine.learner import WeightRoute
from plait.engine.learners import LearnerGroup
from plait.engine.ray_ranks import RayRanks
from plait.engine.rendezvous import free_port
from plait.engine.types import Sample, TrainBatch, Update, UpdateReport
from plait.launch.cluster import learner_env, ray_cluster
from shapes import lengths_like_answers, make_groups, small_model

BUDGET = 1024
LIMIT = 1.05
"""The bare loops do the same arithmetic and nothing else; what is beyond them was not the same."""


def make_rows() -> list[Sample]:
    lengths = lengths_like_answers(0, 16, mean=48, cap=160)
    return make_groups(0, num_prompts=2, group_size=8, prompt_tokens=48, lengths=lengths)


def work(rows: Sequence[Sample], trained: int) -> Work:
    """Trained tokens; the digest is of all ids."""
    return Work(trained, Work.of(row.token_ids.tolist() for row in rows).digest)


class DdpRank:
    def __init__(self, folder: Path, rank: int, world_size: int, port: int) -> None:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
        )
        self.loop = BareLoop(folder, distributed=True)

    def step(self, micro_batches: Sequence[TrainBatch]) -> float:
        return self.loop.step(micro_batches)


@contextmanager
def learner(model: Path, **fields: Any) -> Iterator[LearnerGroup]:
    config = LearnerConfig(max_tokens_per_micro_batch=BUDGET, share_prefixes=False, **fields)
    ranks = RayRanks(str(model), config, ALGORITHM.losses, ALGORITHM.needs, learner_env())
    try:
        ranks.wait_started()
        route = WeightRoute("shared_memory", "float32", 60.0)
        yield LearnerGroup(ranks, config, ALGORITHM.needs, total_steps=10**6, seed=0, route=route)
    finally:
        ranks.close()


def engine_side(group: LearnerGroup, rows: Sequence[Sample]) -> Side:
    def run(number: int) -> Sequence[UpdateReport]:
        return group.update(collate(rows), Update(tuple(rows), "main", {}), step=0)

    def prove(number: int, reports: Sequence[UpdateReport]) -> Work:
        return work(rows, sum(report.tokens["policy"] for report in reports if report.applied))

    return Side("learner", run, prove)


def measure(session: Session) -> None:
    rows = make_rows()
    note = (
        f"{sum(map(len, rows))} tokens in micro-batches of {BUDGET}, 20 million parameters, float32"
    )
    with TemporaryDirectory() as folder, ray_cluster():
        model = small_model(Path(folder))
        with learner(model) as group:
            bare, (batches,) = BareLoop(model), cut(rows, BUDGET)
            trained = sum(int(batch.trained.sum()) for batch in batches)
            alone = Side(
                "bare loop", lambda number: bare.step(batches), lambda n, loss: work(rows, trained)
            )
            session.compare(
                "tokens/s of one rank / bare loop",
                alone,
                engine_side(group, rows),
                target=at_least(0.95),
                limit=LIMIT,
                seconds=100,
                note=note,
            )
        with learner(model, num_workers=2, num_cpus=1, zero_stage=2) as group:
            session.compare(
                "tokens/s of two ranks, ZeRO-2 / DistributedDataParallel",
                ddp_side(model, rows, trained),
                engine_side(group, rows),
                target=at_least(0.9),
                limit=LIMIT,
                seconds=100,
                note=note,
            )


def ddp_side(model: Path, rows: Sequence[Sample], trained: int) -> Side:
    port, shares = free_port("127.0.0.1"), cut(rows, BUDGET, ranks=2)
    actor: Any = ray.remote(DdpRank)
    options = {
        "num_cpus": 0,
        "runtime_env": {"env_vars": {**learner_env(), "OMP_NUM_THREADS": "1"}},
    }
    ranks = [actor.options(**options).remote(model, rank, 2, port) for rank in range(2)]

    def run(number: int) -> list[float]:
        refs = [rank.step.remote(share) for rank, share in zip(ranks, shares, strict=True)]
        return ray.get(refs)

    return Side("DistributedDataParallel", run, lambda number, losses: work(rows, trained))
