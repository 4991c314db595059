"""The proof that ends every weight sync: what each rollout worker serves is what the learner has.

Three independent pieces of evidence, from cheap to whole: checksums of what arrived, the served modules' own answers
to probe inputs (`ServedProof.stale`), and log-probs of probe sequences computed by both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import WeightSyncError, WorkerLost

if TYPE_CHECKING:
    from .contracts import Learners, RolloutPool, ServedProof


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far learner and sampler may differ in one token's log-prob, in nats."""

    max_abs: float
    mean_abs: float

    @classmethod
    def for_dtype(cls, rollout_dtype: str) -> Tolerance:
        """float32 agrees to 1e-6 (Llama, Qwen) or 5e-4 (Gemma 2, other tanh kernels); a stale head is off by 0.3.

        bfloat16 rounds each layer differently in each engine. Measured on SmolLM2 at temperature 1: 0.05-0.08 on
        average, 0.45 on the worst of 250 tokens. Small staleness is not for log-probs to find, but for
        `ServedProof.stale`, which compares exactly.
        """
        return cls(5e-3, 1e-3) if rollout_dtype == "float32" else cls(2.0, 0.2)


@dataclass(frozen=True, slots=True)
class SyncProof:
    """What was established about one version on every worker."""

    version: int
    workers: tuple[str, ...]
    parameters: int
    probe_tokens: int
    max_difference: float
    mean_difference: float


def digest(checksums: Mapping[str, str]) -> str:
    """16 hex digits that stand for the weights of these checksums, by parameter."""
    lines = "".join(f"{name} {checksums[name]}\n" for name in sorted(checksums))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def prove_sync(
    learners: Learners,
    pool: RolloutPool,
    *,
    version: int,
    receivers: Sequence[Any],
    checksums: Mapping[str, str],
    probes: Sequence[Sequence[int]],
    tolerance: Tolerance,
) -> SyncProof:
    """Driver: compare what every receiver serves with what the learner has; WeightSyncError names the difference.

    `checksums` is what `send_weights(version)` returned; `probes` are token sequences of at least two tokens. Receivers
    that were lost are not in the proof; WorkerLost when that is all of them.
    """
    with ThreadPoolExecutor(1) as beside:  # both sides compute at once
        answer = beside.submit(learners.logprobs, probes)
        proofs = pool.prove(version, probes, receivers)
        expected = answer.result()
    if not proofs:
        raise WorkerLost(f"no rollout worker lived to prove version {version}")
    differences: list[float] = []
    for proof in proofs:
        _check_parameters(proof, version, checksums)
        differences += _check_probes(proof, expected, tolerance)
    return SyncProof(
        version=version,
        workers=tuple(proof.worker for proof in proofs),
        parameters=len(checksums),
        probe_tokens=len(differences),
        max_difference=max(differences, default=0.0),
        mean_difference=sum(differences) / max(1, len(differences)),
    )


def _check_parameters(proof: ServedProof, version: int, checksums: Mapping[str, str]) -> None:
    where = f"rollout worker {proof.worker}"
    if proof.version != version:
        raise WeightSyncError(f"{where} serves version {proof.version}, not {version}")
    for name in [*checksums, *proof.checksums]:
        sent, received = checksums.get(name, "nothing"), proof.checksums.get(name, "nothing")
        if sent != received:
            raise WeightSyncError(
                f"{where}, version {version}: parameter {name} has checksum {received}, the learner sent {sent}"
            )
    if proof.stale:
        raise WeightSyncError(
            f"{where}, version {version}: the served copy of {', '.join(proof.stale)} is not proven to compute what "
            "was received; it is stale, or of a layer type whose served copy plait cannot check"
        )


def _check_probes(
    proof: ServedProof, expected: Sequence[Sequence[float]], tolerance: Tolerance
) -> list[float]:
    """Absolute differences of all probe tokens of one worker."""
    where = f"rollout worker {proof.worker}, version {proof.version}"
    differences: list[float] = []
    if len(proof.logprobs) != len(expected):
        raise WeightSyncError(f"{where}: {len(proof.logprobs)} of {len(expected)} probes came back")
    for number, (ours, theirs) in enumerate(zip(expected, proof.logprobs, strict=True)):
        if len(ours) != len(theirs):
            raise WeightSyncError(
                f"{where}, probe {number}: {len(theirs)} log-probs for {len(ours)} tokens"
            )
        for position, (learner, served) in enumerate(zip(ours, theirs, strict=True), start=1):
            difference = abs(learner - served)
            if not difference <= tolerance.max_abs:  # also catches NaN
                raise WeightSyncError(
                    f"{where}, probe {number}, token {position}: served log-prob {served:.6f}, the learner's "
                    f"{learner:.6f}; allowed difference {tolerance.max_abs}"
                )
            differences.append(difference)
    mean = sum(differences) / max(1, len(differences))
    if mean > tolerance.mean_abs:
        raise WeightSyncError(
            f"{where}: log-probs of the probes differ by {mean:.6f} on average; allowed {tolerance.mean_abs}"
        )
    return differences
