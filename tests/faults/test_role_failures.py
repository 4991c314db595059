"""F39: a role that cannot start or runs out of memory gives one clear error and an exit code, and leaves nothing."""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from real_run import RealRun

from end_to_end.command_line import no_verifier, tiny_recipe
from plait.engine.errors import ConfigError, LearnerError, RolloutError
from plait.engine.failpoints import VARIABLE
from plait.engine.learner import Rank
from plait.engine.rendezvous import listen


def fail(folder: Path, recipe: dict[str, Any], code: int, message: str, **env: str) -> float:
    """Seconds to the end of a run that fails as it should."""
    started = time.monotonic()
    run = RealRun(folder, recipe, env)
    try:
        assert run.driver.wait(150) == code, run.said
        took = time.monotonic() - started
        errors = [line for line in run.said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, run.said
        assert re.search(message, errors[0]), errors
        assert "Traceback" not in run.said
        left, _ = run.leftovers(10)
        assert not left
    finally:
        run.driver.kill()
    return took


def recipe_of(model: Path | str, **sections: Any) -> dict[str, Any]:
    recipe = tiny_recipe(
        Path(model), reward=no_verifier("parity:grade"), eval={"num_prompts": 0}, **sections
    )
    recipe["algorithm"] = {"type": "grpo", "rollouts_per_prompt": 2}
    return recipe


def test_f39_a_missing_model(tmp_path, measured) -> None:
    took = fail(tmp_path, recipe_of("models/none"), ConfigError.exit_code, "model.*models/none")
    measured("F39", f"missing model: {took:.1f} s, orphans 0")


def test_f39_a_taken_port(measured) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(LearnerError, match=f"rank 0 cannot listen on 127.0.0.1:{port}"):
            listen(Rank(0, 2, "127.0.0.1", port))
    measured("F39", "port in use: named")


@pytest.mark.long
def test_f39_vllm_cannot_start(tmp_path, tiny_model, measured) -> None:
    recipe = recipe_of(tiny_model, rollouts={"kv_cache_gib": 1e5})
    took = fail(tmp_path, recipe, RolloutError.exit_code, "rollout-0 could not start.*kv cache")
    measured("F39", f"vLLM cannot start: {took:.1f} s, orphans 0")


@pytest.mark.long
def test_f39_a_learner_out_of_memory(tmp_path, tiny_model, measured) -> None:
    point = {VARIABLE: "memory:learner.backward:2"}
    wanted = "learner rank 0 ran out of memory in step"
    took = fail(tmp_path, recipe_of(tiny_model), LearnerError.exit_code, wanted, **point)
    measured("F39", f"learner out of memory: {took:.1f} s, orphans 0")
