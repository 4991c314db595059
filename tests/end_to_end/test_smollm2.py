"""The seven hybrid methods on SmolLM2-135M with real Ray, vLLM and DeepSpeed; each is killed once and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
from math import isfinite

import pytest

from end_to_end.command_line import plait, plait_command, read_lines, write_recipe
from end_to_end.test_train import wait_for

STEPS, CHECKPOINT_EVERY = 4, 2
METHODS = {
    "chord": {"rollouts_per_prompt": 4, "expert_rows_per_step": 4, "sampler_ratio_cap": 2.0},
    "srft": {"rollouts_per_prompt": 4, "sampler_ratio_cap": 2.0},
    "uft": {"rollouts_per_prompt": 4, "sampler_ratio_cap": 2.0},
    "prefix_rft": {"rollouts_per_prompt": 4, "sampler_ratio_cap": 2.0},
    "relift": {"rollouts_per_prompt": 4, "expert_batch_size": 2, "sampler_ratio_cap": 2.0},
    "sasr": {"rollouts_per_prompt": 4, "warmup_steps": 2, "sampler_ratio_cap": 2.0},
    "one_token_rollout": {"samples_per_token": 64},
}


def recipe(name: str) -> dict:
    return {
        "model": "smollm2-135m-instruct",
        "algorithm": {"type": name, **METHODS[name]},
        "data": {
            "type": "reasoning_gym",
            "dataset": "chain_sum",
            "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
            "size": 200,
            "demonstration_template": "We work it out.\nThe result has a sign.\n\\boxed{{answer}}",
        },
        "reward": "math",
        "rollouts": {
            "max_prompt_length": 96,
            "max_response_length": 32,
            "max_num_seqs": 16,
            "kv_cache_gib": 0.5,
        },
        "learner": {"dtype": "bfloat16", "zero_stage": 1, "learning_rate": 1e-5},
        "loop": {"steps": STEPS, "prompts_per_step": 2},
        "eval": {"num_prompts": 0},
        "checkpoint": {"every": CHECKPOINT_EVERY, "keep": 2},
    }


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_is_killed_and_resumes(name, tmp_path):
    write_recipe(tmp_path, f"{name}.yaml", recipe(name))
    run = tmp_path / "runs" / name
    with (tmp_path / "first.log").open("w") as log:
        driver = subprocess.Popen(
            plait_command("train", f"{name}.yaml"), cwd=tmp_path, stdout=log, stderr=log
        )
        try:
            wait_for(
                lambda: (run / "checkpoints" / "latest").exists() or driver.poll() is not None, 300
            )
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
    assert (run / "checkpoints" / "latest").exists(), (tmp_path / "first.log").read_text()
    assert not (run / "summary.json").exists(), "it was killed before its end"

    plait(tmp_path, "resume", f"runs/{name}")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["algorithm"] == name
    assert summary["steps"] == STEPS
    assert summary["weight_sync"]["failed"] == 0
    assert summary["tokens"]["expert"] > 0, "demonstrations trained"
    rows = read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4], "each step once"
    assert all(isfinite(value) for row in rows for value in row.values())
