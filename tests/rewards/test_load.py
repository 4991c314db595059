"""512 math answers of which 1 % are hostile: every healthy one is scored, none waits, the pool is whole afterwards."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil

from b12_rewards import HOSTILE, math_items, open_pool, p99, planted, run_load, single_call

WORKERS = 4
PACE = 4.0
"""Samples arrive at 1 / PACE of what one process does; the other processes cover for those that are replaced."""


def scoring_processes() -> set[int]:
    own = psutil.Process().children()
    return {p.pid for p in own if "plait.rewards.worker" in " ".join(p.cmdline())}


def test_512_answers_with_hostile_ones(
    tmp_path: Path, measured: Callable[[str, str], None]
) -> None:
    items = math_items(512)
    pool, source = open_pool(tmp_path, WORKERS, timeout_seconds=2.0)
    try:
        before = scoring_processes()
        assert len(before) == WORKERS
        pace = PACE * single_call(items[:100])
        clean = run_load(pool, source, items, pace)
        hostile = run_load(pool, source, planted(items), pace)
        bad = [r for r in hostile if r.item.hostile]
        assert sorted(r.item.completion for r in bad) == sorted(HOSTILE)
        assert all(r.score.reward is None for r in bad), "UNKNOWN, not 0"
        healthy = [
            (a.score.reward, b.score.reward)
            for a, b in zip(clean, hostile, strict=True)
            if not b.item.hostile
        ]
        assert all(one == other for one, other in healthy), "survivors 100 %"
        assert [r.score.reward for r in clean] == [float(i % 3 > 0) for i in range(512)]
        assert p99(hostile) <= 2 * p99(clean), (p99(hostile), p99(clean))
        deadline = time.monotonic() + 20
        while len(scoring_processes()) < WORKERS and time.monotonic() < deadline:
            time.sleep(0.1)
        after = scoring_processes()
        assert len(after) == WORKERS
        assert after != before
        ratio = p99(hostile) / p99(clean)
        measured("F21", f"pool {len(before)} before, {len(after)} after; healthy p99 {ratio:.2f}x")
        measured("F22", "survivors 100 % of 512 answers, 1 % of them hostile")
    finally:
        pool.close()
    assert not scoring_processes()
