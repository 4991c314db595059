"""F34: an object store of 80 MiB, a consumer ten times slower than the producers, 640 MB of batches.

python tests/faults/small_store.py FOUND.json
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from stub_ranks import start_ranks
from stub_workers import CONFIG, SECONDS, StubWorker, requests

from plait.engine.config import LearnerConfig
from plait.rollouts import pool as pool_module
from plait.rollouts.pool import Pool

STORE = 80 * 2**20
"""Ray takes no less."""
BATCH = np.zeros(8 * 2**20, np.uint8)
SAMPLE_SECONDS = 0.005


def store_of() -> Any:
    from ray._private.internal_api import node_stats

    (node,) = ray.nodes()
    return node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats


def main(found_file: Path) -> None:
    ray.init(object_store_memory=STORE, include_dashboard=False, logging_level=logging.ERROR)
    pool_module.RolloutWorker = StubWorker  # type: ignore[misc]
    pool_module.environment = lambda config: {SECONDS: str(SAMPLE_SECONDS)}
    pool = Pool("stub", CONFIG, dtype="float32", seed=0)
    pool.wait_started()
    most = taken = 0
    for _ in pool.generate(requests(num_prompts=20, n=8), step=0):
        most = max(most, sum(row["owes"] for row in pool.status()))
        taken += 1
        time.sleep(10 * SAMPLE_SECONDS / (2 * CONFIG.max_num_seqs))
    ranks = start_ranks(LearnerConfig(num_workers=2))
    peak = 0
    for _ in range(40):
        ranks.call("step", [(0.02, BATCH.copy()), (0.02, BATCH.copy())])
        peak = max(peak, store_of().object_store_bytes_used)
    spilled = store_of().spilled_bytes_total
    found = {"taken": taken, "most": most, "peak": peak, "spilled": spilled}
    found_file.write_text(json.dumps(found))
    pool.close()
    ranks.close()
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
