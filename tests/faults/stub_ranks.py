"""Learner ranks in real Ray actors that train nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from plait.engine import ray_ranks
from plait.engine.config import LearnerConfig
from plait.engine.processes import Place
from plait.engine.ray_ranks import RayRanks, RemoteLearner


class Slow:
    def step(self, seconds: float, *ballast: Any) -> Place:
        time.sleep(seconds)
        return Place.here()

    def close(self) -> None:
        """Nothing is held."""


class SlowLearner(RemoteLearner):
    def start(self, *args: Any) -> None:
        self.worker: Any = Slow()


def start_ranks(config: LearnerConfig, seats: Sequence[Mapping[str, Any]] = ()) -> RayRanks:
    ray_ranks.RemoteLearner = SlowLearner  # type: ignore[misc]
    ranks = RayRanks("none", config, {}, {}, {}, seats=seats)
    ranks.wait_started()
    return ranks
