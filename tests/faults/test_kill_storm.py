"""F20 and F35: random kills for minutes, on a run with real vLLM and real DeepSpeed in deterministic mode."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from real_run import ROLES, SCORING, RealRun

from end_to_end.command_line import no_verifier, tiny_recipe
from plait.engine.errors import Stopped

pytestmark = pytest.mark.long
SECONDS = float(os.environ.get("PLAIT_STORM_SECONDS", "600"))
WARM_STEPS = 4
GRADE_SECONDS = 0.2
"""Of a verifier that is as slow as many are. The run that shows the expected bits goes without and ends sooner."""


def storm_recipe(model: Path, steps: int, checkpoint_every: int = 1) -> dict[str, Any]:
    recipe = tiny_recipe(
        model,
        run={"deterministic": True},
        reward=no_verifier("parity:grade"),
        rollouts={"num_workers": 2, "silence_seconds": 20, "max_response_length": 16},
        learner={"num_spares": 1, "silence_seconds": 20},
        loop={"steps": steps, "prompts_per_step": 8, "max_restarts": 1000},
        checkpoint={"every": checkpoint_every},
        eval={"num_prompts": 0},
    )
    recipe["algorithm"] = {"type": "grpo", "rollouts_per_prompt": 6}
    return recipe


def rage(run: RealRun, seconds: float, seed: int) -> list[str]:
    """SIGKILL a process of a random role every U(5, 20) s; which roles were struck."""
    rng, struck = random.Random(seed), []
    end = time.monotonic() + seconds
    while (pause := rng.uniform(5, 20)) and time.monotonic() + pause < end:
        time.sleep(pause)
        role = rng.choice([*ROLES, SCORING])
        victims = run.of_role(role)
        if victims:
            os.kill(rng.choice(sorted(victims)), signal.SIGKILL)
            struck.append(role)
        assert run.driver.poll() is None, run.said
    time.sleep(max(0.0, end - time.monotonic()))
    return struck


def test_f20_the_run_survives_a_storm_of_kills_with_the_same_bits(
    tmp_path, tiny_model, measured
) -> None:
    run = RealRun(
        tmp_path / "storm", storm_recipe(tiny_model, 100_000), grade_seconds=GRADE_SECONDS
    )
    try:
        run.wait_for_step(WARM_STEPS, 120)
        first, started = run.rows()[-1]["step"], time.monotonic()
        struck = rage(run, SECONDS, seed=20)
        last = run.rows()[-1]["step"]
        wall = time.monotonic() - started
        run.driver.send_signal(signal.SIGTERM)
        assert run.driver.wait(60) == Stopped.exit_code, run.said
        left, took = run.leftovers(10)
        assert not left
    finally:
        run.driver.kill()
    undisturbed = median(row["time/step"] for row in run.rows()[1:WARM_STEPS])
    rows = [row for row in run.rows() if first < row["step"] <= last]
    assert [row["step"] for row in rows] == list(range(first + 1, last + 1)), "each step once"
    ratio = sum(row["time/step"] for row in rows) / wall
    calm = RealRun(tmp_path / "calm", storm_recipe(tiny_model, last, checkpoint_every=0))
    try:
        assert calm.driver.wait(SECONDS + 200) == 0, calm.said
    finally:
        calm.driver.kill()
    expected, found = calm.weights(), run.weights()
    assert all(found[step] == expected[step] for step in range(1, last + 1))
    speed = (last - first) * undisturbed / wall
    print(f"\n{len(struck)} kills in {wall:.0f} s: effective training time {ratio:.3f}, {run.said}")
    assert ratio >= 0.80
    kills = ", ".join(f"{struck.count(role)} x {role}" for role in sorted(set(struck)))
    measured(
        "F20",
        f"{wall:.0f} s, {kills}: {last} steps with equal bits, effective training time {ratio:.2f}, "
        f"speed {speed:.2f} of an undisturbed run",
    )
    measured("F35", f"after {len(struck)} kills and the end: leftovers 0 in {took:.1f} s")


def test_f35_a_killed_driver_leaves_nothing(tmp_path, tiny_model, measured) -> None:
    run = RealRun(tmp_path / "run", storm_recipe(tiny_model, 100_000))
    try:
        run.wait_for_step(2, 120)
        victim = run.of_role("rollout worker")[0]
        os.kill(victim, signal.SIGSTOP)
        assert len(run.processes()) > 5
    finally:
        run.driver.kill()
    run.driver.wait()
    left, took = run.leftovers(10)
    assert not left
    measured("F35", f"after SIGKILL of the driver, one worker stopped: leftovers 0 in {took:.1f} s")
