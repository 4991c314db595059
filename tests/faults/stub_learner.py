"""A learner in this process that sends made-up weights through the real shared-memory sender."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from stub_workers import draw, make_weights

from plait.engine.sync_proof import SyncProof, Tolerance, prove_sync
from plait.engine.types import Rollout
from plait.engine.weight_sync import SharedMemorySender
from plait.rollouts.pool import Pool
from plait.rollouts.worker import sample_seed


class StubLearner:
    """What loop.sync does, with a step that replaces all weights."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.version, self.joined = pool, 0, 0
        self.sender = SharedMemorySender(rank=0, dtype=torch.float32, timeout_seconds=20)

    def publish(self, version: int) -> SyncProof:
        self.version = version
        return self.sync(self.pool.receivers())

    def sync(self, receivers: Sequence[Any]) -> SyncProof:
        self.sender.connect(receivers)
        checksums = self.sender.send(lambda: make_weights(self.version).items(), self.version)
        proof = prove_sync(
            self,  # pyright: ignore[reportArgumentType]
            self.pool,
            version=self.version,
            receivers=receivers,
            checksums=checksums,
            probes=[],
            tolerance=Tolerance.for_dtype("float32"),
        )
        self.pool.admit(self.version, receivers, self.join)
        return proof

    def join(self, receivers: Sequence[Any]) -> None:
        self.joined += len(receivers)
        self.sync(receivers)

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return []

    def expected(self, step: int) -> Mapping[tuple[str, int], tuple[int, ...]]:
        """Tokens of all samples of stub_workers.requests()."""
        weights = make_weights(self.version)
        return {
            (f"p/{i}", k): draw(weights, sample_seed(self.pool.seed, step, f"p/{i}", k), 8)
            for i in range(8)
            for k in range(4)
        }

    def check(self, rollouts: Sequence[Rollout], step: int) -> None:
        """Every sample once, each drawn from the whole of the present weights."""
        keys = [(rollout.prompt_id, rollout.index) for rollout in rollouts]
        expected = self.expected(step)
        assert len(keys) == len(set(keys)), "no sample twice"
        assert set(keys) == set(expected), "none lost"
        wrong = [r for r in rollouts if r.token_ids != expected[r.prompt_id, r.index]]
        assert not wrong, f"{len(wrong)} samples of other weights"
        assert {rollout.policy_version for rollout in rollouts} == {self.version}
