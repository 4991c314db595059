"""B7: how fast SmolLM2's weights reach vLLM, against a copy of as many bytes in memory, and what four receivers cost.

A sync is what the learner does: convert, hash, lay out, and drive vLLM's own update sequence on the receivers. Bits
that a receiver serves are hashed after every run and must be those that were copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from figures import at_least, at_most
from harness import Session, Side, Work, cost
from plait.engine.sync_proof import digest
from plait.engine.weight_sync import WeightSender, checksum, make_sender
from plait.launch.cluster import ray_cluster
from plait.launch.model import resolve_model
from plait.rollouts.config import RolloutConfig
from plait.rollouts.pool import Pool
from quickstart_run import quickstart_steps, share_of_steps

MODEL = "smollm2-135m-instruct"
COPIES = 10
CONFIG = RolloutConfig(
    max_prompt_length=32, max_response_length=32, max_num_seqs=4, kv_cache_gib=0.1
)


class Weights:
    """The model's parameters in bfloat16, and a buffer as large."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.flat = torch.cat([p.detach().view(-1) for _, p in self.named()])
        self.copy = torch.empty_like(self.flat)

    def named(self) -> Any:
        return self.model.named_parameters()

    @property
    def num_bytes(self) -> int:
        return self.flat.nbytes

    def copied(self) -> Work:
        """What the buffer holds, hashed parameter by parameter."""
        place, sums = 0, {}
        for name, parameter in self.named():
            part = self.copy[place : place + parameter.numel()]
            sums[name], place = checksum(part.view(parameter.shape)), place + parameter.numel()
        return Work(self.num_bytes, digest(sums))


class Served:
    """Sends to some of the pool's workers, a version at a time."""

    version = 0

    def __init__(self, weights: Weights, pool: Pool, receivers: Sequence[Any]) -> None:
        self.weights, self.pool, self.receivers = weights, pool, receivers
        self.sender: WeightSender = make_sender(
            "shared_memory", rank=0, dtype=torch.bfloat16, timeout_seconds=120.0
        )
        self.sender.connect(receivers)

    def send(self, number: int) -> Mapping[str, str]:
        Served.version += 1
        return self.sender.send(self.weights.named, Served.version)

    def work(self, number: int, sent: Mapping[str, str]) -> Work:
        """Every receiver proves what it serves."""
        proofs = self.pool.prove(Served.version, [], self.receivers)
        found = {digest(proof.checksums) for proof in proofs}
        stale = [name for proof in proofs for name in proof.stale]
        if len(proofs) < len(self.receivers) or stale or len(found) > 1:
            raise RuntimeError(f"{len(proofs)} receivers serve {len(found)} models; stale: {stale}")
        return Work(self.weights.num_bytes, found.pop())

    @property
    def side(self) -> Side:
        return Side(f"sync to {len(self.receivers)}", self.send, self.work)


def measure(session: Session) -> None:
    folder = resolve_model(MODEL)
    weights = Weights(folder)
    with ray_cluster():
        with workers(folder, 1, threads=2) as pool:
            measure_bandwidth(session, weights, pool)
        with workers(folder, 4, threads=1) as pool:
            measure_fan_out(session, weights, pool)
    if session.quick:
        return
    shares = share_of_steps(quickstart_steps(5), "sync")
    note = "SmolLM2-135M, quickstart recipe; with the proof of each sync"
    session.derive("share of a real step", shares, target=at_most(0.05), note=note)


@contextmanager
def workers(folder: str, num: int, threads: int) -> Iterator[Pool]:
    config = CONFIG.model_copy(update={"num_workers": num, "num_cpus": threads})
    pool = Pool(folder, config, dtype="bfloat16", seed=0)
    try:
        pool.wait_started()
        yield pool
    finally:
        pool.close()


def measure_bandwidth(session: Session, weights: Weights, pool: Pool) -> None:
    def copy(number: int) -> None:
        for _ in range(COPIES):
            weights.copy.copy_(weights.flat)

    session.compare(
        "bytes/s of a sync / of a copy in memory",
        Side("memcpy", copy, lambda given, result: weights.copied(), repeats=COPIES),
        Served(weights, pool, pool.receivers()).side,
        target=at_least(0.4),
        limit=1.0,
        seconds=60,
        note=f"{weights.num_bytes / 1e6:.0f} MB; the copy uses all cores",
    )


def measure_fan_out(session: Session, weights: Weights, pool: Pool) -> None:
    receivers = pool.receivers()
    session.compare(
        "time for 4 receivers / for 1",
        Served(weights, pool, receivers[:1]).side,
        Served(weights, pool, receivers).side,
        target=at_most(1.5),
        value=cost,
        seconds=60,
        note="one thread each, on the same cores",
    )
