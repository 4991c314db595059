"""Sampler and learner are one policy: log-probs agree after every update, in float32."""

from __future__ import annotations

import numpy as np
import pytest

from plait.algorithms import Setup
from plait.algorithms.sft import Sft, SftConfig
from plait.engine.config import LearnerConfig
from plait.engine.learner import LearnerWorker, Rank, WeightRoute
from plait.engine.learners import InProcessRank, LearnerGroup
from plait.engine.sync_proof import Tolerance, prove_sync
from plait.engine.types import Prompt, RolloutRequest, Sample, Sampling, Source, Update
from plait.launch.model import resolve_model
from plait.rollouts.config import RolloutConfig
from plait.rollouts.pool import Pool


def expert_rows(vocabulary: int, seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    n = 24
    source = np.full(n, Source.EXPERT, dtype=np.int8)
    source[:4] = Source.CONTEXT
    zeros = np.zeros(n, dtype=np.float32)
    return [
        Sample(
            rng.integers(3, vocabulary, n).astype(np.int32), source, zeros, zeros + 1, zeros + np.nan, str(i)
        )
        for i in range(4)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tolerance", "rate"),
    [("tiny", 1e-5, 3e-3), ("smollm2-135m-instruct", 1e-3, 1e-4)],
)
def test_log_probs_agree_after_every_one_of_five_updates(
    name, tolerance, rate, tiny_model, ray_session
):
    path = str(tiny_model) if name == "tiny" else resolve_model(name)
    algorithm = Sft(SftConfig(), Setup(Sampling(16)))
    config = LearnerConfig(learning_rate=rate)
    worker = LearnerWorker(path, config, algorithm.losses, algorithm.needs, Rank())
    route = WeightRoute("shared_memory", "float32", 120.0)
    learners = LearnerGroup(
        InProcessRank(worker), config, algorithm.needs, total_steps=5, seed=0, route=route
    )
    rollouts = RolloutConfig(max_prompt_length=64, max_response_length=16, kv_cache_gib=0.2)
    pool = Pool(path, rollouts, dtype="float32", seed=0)
    try:
        pool.wait_started()
        learners.connect(pool.receivers())
        prompt = Prompt("p", (), (5, 17, 9, 200, 31, 44))
        probes = [[5, 17, 9, 200, 31, 44, 12, 250, 99, 7], [3, 300, 300, 8]]
        before = learners.logprobs(probes)
        for step in range(5):
            update = Update(tuple(expert_rows(300, step)), "main", {})
            learners.update(worker_batch(update), update, step=step)
            proof = prove_sync(
                learners,
                pool,
                version=step + 1,
                receivers=pool.receivers(),
                checksums=learners.send_weights(step + 1),
                probes=probes,
                tolerance=Tolerance.for_dtype("float32"),
            )
            assert proof.max_difference <= tolerance
            # What is sampled carries the log-probs that the learner gives it.
            for rollout in pool.generate([RolloutRequest(prompt, 4, Sampling(12))], step=step):
                assert rollout.policy_version == step + 1
                ours = learners.logprobs([[*prompt.token_ids, *rollout.token_ids]])[0]
                gap = np.abs(np.subtract(ours[len(prompt.token_ids) - 1 :], rollout.logprobs))
                assert gap.max() <= tolerance
        moved = np.abs(np.subtract(learners.logprobs(probes)[0], before[0])).max()
        assert moved > 100 * tolerance, "the updates changed what is compared"
    finally:
        pool.close()
        learners.close()


def worker_batch(update: Update):
    from plait.engine.batch import collate

    return collate(update.samples)
