"""Every kind of disagreement between learner and workers stops the run and names what differs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from plait.engine.errors import WeightSyncError, WorkerLost
from plait.engine.sync_proof import SyncProof, Tolerance, prove_sync

CHECKSUMS = {"a.weight": "01", "b.weight": "02"}
LOGPROBS = ((-1.0, -2.0), (-0.5,))


@dataclass(frozen=True)
class Proof:
    worker: str = "rollout-0"
    version: int = 3
    checksums: dict[str, str] = field(default_factory=lambda: dict(CHECKSUMS))
    stale: tuple[str, ...] = ()
    logprobs: tuple[tuple[float, ...], ...] = LOGPROBS


class Both:
    """Learner and pool."""

    def __init__(self, *proofs: Proof) -> None:
        self.proofs = proofs

    def logprobs(self, sequences: Any) -> Any:
        return LOGPROBS

    def prove(self, version: int, probes: Any, receivers: Any) -> Any:
        return self.proofs


def prove(*proofs: Proof, tolerance: Tolerance = Tolerance(1e-3, 1e-4)) -> SyncProof:  # noqa: B008
    both: Any = Both(*proofs)
    return prove_sync(
        both,
        both,
        version=3,
        receivers=(),
        checksums=CHECKSUMS,
        probes=[(1, 2, 3), (4, 5)],
        tolerance=tolerance,
    )


def test_agreement_is_measured() -> None:
    other = Proof("rollout-1", logprobs=((-1.0, -2.0002), (-0.5,)))
    proof = prove(Proof(), other)
    assert (proof.version, proof.workers, proof.parameters) == (3, ("rollout-0", "rollout-1"), 2)
    assert proof.probe_tokens == 6
    assert proof.max_difference == pytest.approx(2e-4)
    assert proof.mean_difference == pytest.approx(2e-4 / 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "rollout-1 serves version 2, not 3"),
        ({"checksums": {"a.weight": "01"}}, "b.weight has checksum nothing, the learner sent 02"),
        ({"checksums": {**CHECKSUMS, "c": "03"}}, "parameter c has checksum 03, .* sent nothing"),
        ({"checksums": {**CHECKSUMS, "a.weight": "ff"}}, "a.weight has checksum ff, .* sent 01"),
        ({"stale": ("lm_head.weight",)}, "served copy of lm_head.weight"),
        ({"logprobs": LOGPROBS[:1]}, "1 of 2 probes came back"),
        ({"logprobs": ((-1.0,), (-0.5,))}, "probe 0: 1 log-probs for 2 tokens"),
        ({"logprobs": ((-1.0, -2.5), (-0.5,))}, r"probe 0, token 2: served .* -2\.5.* -2\.0"),
        ({"logprobs": ((-1.0, -2.0), (math.nan,))}, "probe 1, token 1: served log-prob nan"),
        ({"logprobs": ((-1.0009, -2.0009), (-0.5009,))}, "on average"),
    ],
)
def test_disagreement_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightSyncError, match=message):
        prove(Proof(), replace(Proof("rollout-1"), **change))


def test_no_worker_is_no_proof() -> None:
    with pytest.raises(WorkerLost, match="no rollout worker"):
        prove()


def test_tolerance_separates_rounding_from_wrong_weights() -> None:
    """Measured: float32 differs by at most 6e-4, a stale head by 0.3; bfloat16 by 0.08 on average, 0.45 at most."""
    fp32, bf16 = Tolerance.for_dtype("float32"), Tolerance.for_dtype("bfloat16")
    assert 6e-4 < fp32.max_abs < 0.3
    assert bf16.mean_abs > 0.08
    assert bf16.max_abs > 0.45
