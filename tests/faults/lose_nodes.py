"""F6 and F7: nodes of a cluster leave and come back under rollout workers and learner ranks.

python tests/faults/lose_nodes.py FOUND.json
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from stub_learner import StubLearner
from stub_ranks import start_ranks
from stub_workers import CONFIG, SECONDS, StubWorker, requests

from plait.engine.config import LearnerConfig
from plait.engine.errors import ClusterError, LearnerLost
from plait.rollouts import pool as pool_module
from plait.rollouts.pool import Pool

SAMPLE_SECONDS = 0.1
STEP = [(0.2,)]


def rate(learner: StubLearner, seconds: float, step: int) -> float:
    """Samples a second, over whole steps."""
    done, started = 0, time.monotonic()
    while time.monotonic() - started < seconds:
        rollouts = list(learner.pool.generate(requests(), step=step))
        learner.check(rollouts, step)
        done += len(rollouts)
    return done / (time.monotonic() - started)


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - started


def lose_rollout_node(cluster: Cluster) -> dict[str, float]:
    nodes = [cluster.add_node(num_cpus=1, resources={"rollout": 1}) for _ in range(2)]
    pool_module.RolloutWorker = StubWorker  # type: ignore[misc]
    pool_module.environment = lambda config: {SECONDS: str(SAMPLE_SECONDS)}
    seats = [{"resources": {"rollout": 1}}] * 2
    config = CONFIG.model_copy(update={"max_num_seqs": 1, "silence_seconds": 5})
    pool = Pool("stub", config, dtype="float32", seed=0, seats=seats)
    pool.wait_started()
    learner = StubLearner(pool)
    learner.publish(1)
    rate(learner, 1, 0)
    before = rate(learner, 4, 1)
    cluster.remove_node(nodes[1], allow_graceful=False)
    detected = wait_for(lambda: pool.losses)
    during = rate(learner, 6, 2)
    learner.publish(2)
    cluster.add_node(num_cpus=1, resources={"rollout": 1})
    back = wait_for(lambda: len(pool.receivers()) == 2)
    after = rate(learner, 4, 3)
    pool.close()
    return {"before": before, "during": during, "after": after, "detected": detected, "back": back}


def lose_learner_node(cluster: Cluster) -> dict[str, Any]:
    homes = [cluster.add_node(num_cpus=1, resources={"learner": 1}) for _ in range(2)]
    config = LearnerConfig(silence_seconds=5, place_seconds=8)
    ranks = start_ranks(config, [{"resources": {"learner": 1}}])
    (place,) = ranks.call("step", STEP)
    home = next(node for node in homes if node.node_id == place.node)
    (other,) = (node for node in homes if node is not home)
    cluster.remove_node(home, allow_graceful=False)
    started, message = time.monotonic(), ""
    try:
        ranks.call("step", [(30.0,)])
    except LearnerLost as lost:
        message = str(lost)
    ranks.restart()
    (place,) = ranks.call("step", STEP)
    moved = time.monotonic() - started
    cluster.remove_node(other, allow_graceful=False)
    started = time.monotonic()
    with contextlib.suppress(LearnerLost):
        ranks.call("step", [(30.0,)])
    reason = ""
    try:
        ranks.restart()
    except ClusterError as error:
        reason = str(error)
    decided = time.monotonic() - started
    return {
        "moved": moved,
        "elsewhere": place.node == other.node_id,
        "lost": message,
        "decided": decided,
        "reason": reason,
    }


def main(found_file: Path) -> None:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    try:
        found = {"rollout": lose_rollout_node(cluster), "learner": lose_learner_node(cluster)}
        found_file.write_text(json.dumps(found))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
