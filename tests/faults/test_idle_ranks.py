"""A learner rank that dies while the run samples, and nobody calls it."""

from __future__ import annotations

import os
import signal
import time

import pytest
from stub_ranks import SlowLearner, start_ranks

from plait.engine import ray_ranks
from plait.engine.config import LearnerConfig
from plait.engine.errors import LearnerLost


def test_a_rank_that_dies_between_calls_is_known_within_5_s(ray_session, monkeypatch) -> None:
    monkeypatch.setattr(ray_ranks, "RemoteLearner", SlowLearner)
    ranks = start_ranks(LearnerConfig(num_workers=2))
    try:
        places = ranks.call("step", [(0.0,)] * 2)
        assert [row["lost"] for row in ranks.status()] == ["", ""]
        os.kill(places[1].pid, signal.SIGKILL)
        died = time.monotonic()
        while not (lost := ranks.status()[1]["lost"]):
            assert time.monotonic() - died <= 5
            time.sleep(0.2)
        assert lost
        assert ranks.status()[0]["lost"] == ""
        with pytest.raises(LearnerLost, match="learner rank 1 died in step"):
            ranks.call("step", [(0.0,)] * 2)
        ranks.restart()
        assert [row["lost"] for row in ranks.status()] == ["", ""]
    finally:
        ranks.close()
