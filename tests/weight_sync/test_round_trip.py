"""Weights from a learner in this process into real vLLM engines and back as log-probs, float32 on CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray
import torch

from plait.engine.errors import WeightSyncError, WorkerLost
from plait.engine.sync_proof import Tolerance, prove_sync
from plait.engine.weight_sync import SharedMemorySender
from plait.rollouts import pool as pool_module
from plait.rollouts.pool import Pool
from weight_sync.served_model import (
    CONFIG,
    PROBES,
    PROMPT,
    ForgetfulWorker,
    LocalLearner,
    request,
    write_model,
)

EXACT = Tolerance(max_abs=1e-5, mean_abs=1e-5)


class Sync:
    """A learner, a pool that serves it, and the way between them."""

    def __init__(self, folder: str) -> None:
        self.learner = LocalLearner(folder)
        self.pool = Pool(folder, CONFIG, dtype="float32", seed=0)
        self.pool.wait_started()
        self.sender = SharedMemorySender(rank=0, dtype=torch.float32, timeout_seconds=120)
        self.sender.connect(self.pool.receivers())
        self.version = 0
        self.checksums: dict[str, str] = {}

    def send(self) -> None:
        self.version += 1
        self.checksums = dict(self.sender.send(self.learner.weights, self.version))

    def prove(self):
        return prove_sync(
            self.learner,  # pyright: ignore[reportArgumentType]
            self.pool,
            version=self.version,
            receivers=self.pool.receivers(),
            checksums=self.checksums,
            probes=PROBES,
            tolerance=EXACT,
        )

    def close(self) -> None:
        self.sender.close()
        self.pool.close()


# A vocabulary that is no multiple of 64 is padded by vLLM; qwen2 has biases, and a head of its own here.
@pytest.fixture(scope="module", params=["tied-llama", "untied-qwen2"])
def sync(request, ray_session, tmp_path_factory) -> Iterator[Sync]:
    tied = request.param == "tied-llama"
    folder = tmp_path_factory.mktemp(request.param)
    opened = Sync(
        write_model(
            folder, "llama" if tied else "qwen2", tied=tied, vocab_size=330 if tied else 320
        )
    )
    yield opened
    opened.close()


def test_five_changes_are_served_exactly(sync: Sync) -> None:
    for seed in range(5):
        sync.learner.step(seed)
        sync.send()
        proof = sync.prove()
        assert proof.version == sync.version
        assert proof.parameters == len(list(sync.learner.weights()))
        assert proof.probe_tokens == sum(len(probe) - 1 for probe in PROBES)
        rollouts = list(sync.pool.generate([request(3)], step=seed))
        assert {rollout.policy_version for rollout in rollouts} == {sync.version}
        for rollout in rollouts:
            (expected,) = sync.learner.logprobs([(*PROMPT.token_ids, *rollout.token_ids)])
            assert rollout.logprobs == pytest.approx(expected[-len(rollout.logprobs) :], abs=1e-5)


def test_same_prompt_is_not_answered_from_the_cache_of_older_weights(sync: Sync) -> None:
    (before,) = sync.pool.generate([request(1)], step=0)
    sync.learner.step(99, size=0.1)
    sync.send()
    (after,) = sync.pool.generate([request(1)], step=0)
    assert after.policy_version == before.policy_version + 1
    (expected,) = sync.learner.logprobs([(*PROMPT.token_ids, *after.token_ids)])
    assert after.logprobs == pytest.approx(expected[-len(after.logprobs) :], abs=1e-5)
    assert after.logprobs[0] != pytest.approx(before.logprobs[0], abs=1e-3)


def test_missing_parameter_is_stale(sync: Sync) -> None:
    sync.send()
    complete = sync.learner.weights
    sync.learner.weights = lambda: [  # type: ignore[method-assign]
        pair for pair in complete() if "layers.1.mlp.up_proj" not in pair[0]
    ]
    try:
        sync.send()
        with pytest.raises(WeightSyncError, match=r"layers\.1\.mlp\.gate_up_proj\.weight"):
            sync.prove()
    finally:
        sync.learner.weights = complete  # type: ignore[method-assign]
    sync.send()
    sync.prove()


def test_wrong_learner_is_noticed(sync: Sync) -> None:
    sync.send()
    sync.learner.step(5)
    with pytest.raises(WeightSyncError, match=r"rollout-0.*probe 0, token \d+: served log-prob -"):
        sync.prove()
    sync.send()
    sync.prove()


@pytest.fixture(scope="module")
def forgetful(ray_session, tmp_path_factory) -> Iterator[Sync]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "RolloutWorker", ForgetfulWorker)
        opened = Sync(write_model(tmp_path_factory.mktemp("forgetful"), "llama", tied=True))
    yield opened
    opened.close()


@pytest.mark.parametrize("size", [0.02, 1e-7])
def test_old_packed_head_is_stale(forgetful: Sync, size: float) -> None:
    """Also after the tiniest change, which no log-prob would show."""
    forgetful.learner.step(1, size)
    forgetful.send()
    with pytest.raises(WeightSyncError, match=r"served copy of model\.embed_tokens\.weight is not"):
        forgetful.prove()


# Last, because the worker is of no use afterwards.
def test_corrupted_parameter_is_named_and_nothing_is_served(forgetful: Sync, monkeypatch) -> None:
    write = forgetful.sender._write

    def flip_one_bit(weights):
        info = write(weights)
        place = info["names"].index("model.layers.1.mlp.down_proj.weight")
        with open(info["path"], "r+b") as buffer:
            buffer.seek(info["offsets"][place] + 1000)
            byte = buffer.read(1)[0]
            buffer.seek(-1, 1)
            buffer.write(bytes([byte ^ 1]))
        return info

    monkeypatch.setattr(forgetful.sender, "_write", flip_one_bit)
    with pytest.raises(
        WeightSyncError, match=r"rollout-0.*model\.layers\.1\.mlp\.down_proj\.weight"
    ):
        forgetful.send()
    monkeypatch.undo()
    (worker,) = forgetful.pool.receivers()
    (task,) = forgetful.pool._tasks(request(1), 0)
    for _ in range(2):
        with pytest.raises(WorkerLost, match="did not finish a weight update"):
            ray.get(worker.generate.remote(task))
        forgetful.send()  # leaves it out: what the broken update left behind cannot be updated
