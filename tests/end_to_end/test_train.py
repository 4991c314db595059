"""Whole runs of the tiny model: real Ray, real vLLM, real DeepSpeed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest

from end_to_end.command_line import (
    no_verifier,
    plait,
    plait_command,
    processes_naming,
    read_lines,
    tiny_recipe,
    write_recipe,
)


@pytest.fixture(scope="module")
def chord_run(work_folder, tiny_model):
    """One CHORD run of three steps on one rank."""
    recipe = tiny_recipe(
        tiny_model, reward=no_verifier("parity:grade"), checkpoint={"every": 2, "keep": 2}
    )
    output = plait(work_folder, "train", write_recipe(work_folder, "chord.yaml", recipe))
    return work_folder / "runs" / "chord", output.stdout


def test_the_summary_tells_what_happened(chord_run):
    folder, _ = chord_run
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["algorithm"] == "chord"
    assert summary["steps"] == 3
    assert summary["policy_versions"] == 4
    assert summary["weight_sync"] == {"proved": 4, "failed": 0}
    assert summary["eval_before"]["num_prompts"] == 6
    assert 0 <= summary["eval_after"]["accuracy"] <= 1
    assert summary["tokens"]["policy"] > 0
    assert summary["tokens"]["expert"] > 0
    admission = summary["data"]["admission"]
    assert admission["demonstrations"] == admission["admitted"] == summary["data"]["kept"] == 34
    assert admission["right"] + admission["wrong"] == 34
    assert {"start", "rollout", "update", "sync", "eval", "export", "total"} <= set(
        summary["wall_seconds"]
    )


def test_metrics_are_those_of_the_page(chord_run):
    """Every name that a run writes is documented."""
    folder, _ = chord_run
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    steps = [row for row in read_lines(folder / "metrics.jsonl") if "reward/mean" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        completed = row["step"] - 1
        assert row["main/mu"] == pytest.approx(0.05 + 0.425 * (1 + cos(pi * completed / 4)))
        assert row["rollouts/count"] == 12
        assert row["rows/expert"] == 4
        assert row["staleness/max"] == 0
        assert 0 < row["main/expert_gradient_share"] < 1
        assert row["main/sampler_gap"] < 1e-4
        for name in row:
            documented = name.replace("main/", "LOSS/")
            documented = "time/PHASE" if name.startswith("time/") else documented
            if name.startswith("ledger/demonstrations_unused/"):
                documented = "ledger/demonstrations_unused/REASON"
            documented = "`LOSS/mu`" if name == "main/mu" else f"`{documented}`"
            assert documented in page, name


def test_every_rollout_is_on_disk_with_its_score_and_version(chord_run):
    folder, _ = chord_run
    for step in (1, 2, 3):
        rows = read_lines(folder / "rollouts" / f"step-{step:06d}.jsonl")
        assert len(rows) == 12
        assert {row["policy_version"] for row in rows} == {step - 1}
        assert {row["status"] for row in rows} <= {"ok", "unknown"}
    held_out = {row["prompt_id"] for row in read_lines(folder / "rollouts" / "eval-000003.jsonl")}
    trained = {
        row["prompt_id"]
        for step in (1, 2, 3)
        for row in read_lines(folder / "rollouts" / f"step-{step:06d}.jsonl")
    }
    assert not held_out & trained


def test_the_export_is_the_trained_model(chord_run):
    """transformers loads it, and its greedy answers are those of the run's last evaluation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = chord_run
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "export")
    for row in read_lines(folder / "rollouts" / "eval-000003.jsonl")[:3]:
        prompt = tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        text = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == row["text"]


def test_the_console_says_a_line_a_step(chord_run):
    _, output = chord_run
    assert "weights proved" in output
    for step in (1, 2, 3):
        assert f"step {step}/3" in output
    assert "accuracy" in output


def test_eval_and_export_of_a_run(chord_run, work_folder):
    folder, _ = chord_run
    result = json.loads(plait(work_folder, "eval", "runs/chord", "--json").stdout)
    summary = json.loads((folder / "summary.json").read_text())
    assert result["accuracy"] == summary["eval_after"]["accuracy"]
    assert result["num_scored"] == 6
    plait(work_folder, "export", "runs/chord", "--output", "again")
    first = (folder / "export" / "model.safetensors").read_bytes()
    assert (work_folder / "again" / "model.safetensors").read_bytes() == first


def test_own_reward_and_method_from_a_folder_on_two_ranks(work_folder, tiny_model):
    """Only rewards.py, a method and a recipe; two ZeRO-2 ranks, two rollout workers, two minibatches, LoRA."""
    folder = work_folder / "mine"
    folder.mkdir()
    (folder / "data.jsonl").write_text((work_folder / "data.jsonl").read_text())
    (folder / "rewards.py").write_text(
        "def my_reward(prompt, completion):\n"
        "    return 0.25 + 0.5 * (len(completion) % 2) + 0 * len(prompt.answer)\n"
    )
    (folder / "my_method.py").write_text(method_of_the_docs())
    recipe = tiny_recipe(
        tiny_model,
        reward=no_verifier("rewards:my_reward"),
        learner={
            "num_workers": 2,
            "zero_stage": 2,
            "parameter_selection": {"type": "lora", "rank": 4},
        },
        rollouts={"num_workers": 2},
        loop={"steps": 2, "prompts_per_step": 4, "prompts_per_minibatch": 2},
    )
    recipe["algorithm"] = {"type": "my_method:MyMethod", "rollouts_per_prompt": 3}
    plait(folder, "train", write_recipe(folder, "recipe.yaml", recipe))
    run = folder / "runs" / "recipe"
    rows = read_lines(run / "rollouts" / "step-000001.jsonl")
    assert {row["reward"] for row in rows} == {0.25, 0.75}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["optimizer_steps"] == 4
    assert summary["weight_sync"]["proved"] == 3
    steps = [row for row in read_lines(run / "metrics.jsonl") if "reward/mean" in row]
    assert all(row["rows/expert"] == 8 for row in steps)


def method_of_the_docs() -> str:
    """The example of docs/algorithms/index.md, as a reader would copy it."""
    page = (Path(__file__).parents[2] / "docs" / "algorithms" / "index.md").read_text()
    return page.split("```python\n")[1].split("```")[0]


def test_a_killed_run_resumes_to_its_end_and_leaves_nothing_behind(work_folder, tiny_model):
    recipe = tiny_recipe(
        tiny_model, loop={"steps": 6}, checkpoint={"every": 2}, eval={"num_prompts": 2}
    )
    write_recipe(work_folder, "killed.yaml", recipe)
    run = work_folder / "runs" / "killed"
    mark = "PLAIT_TEST_MARK=killed-run"
    driver = subprocess.Popen(
        plait_command("train", "killed.yaml"),
        cwd=work_folder,
        env={**os.environ, "PLAIT_TEST_MARK": "killed-run"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: (run / "checkpoints" / "latest").exists(), 240)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert not (run / "summary.json").exists()
    wait_for(lambda: not processes_naming(mark), 30)
    plait(work_folder, "resume", "runs/killed")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["policy_versions"] == 7
    assert summary["eval_before"] is not None, (
        "measured by the first process, kept in the checkpoint"
    )
    steps = [row["step"] for row in read_lines(run / "metrics.jsonl") if "reward/mean" in row]
    assert steps == [1, 2, 3, 4, 5, 6], "each step once"


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def test_sft_trains_without_rollouts(work_folder, tiny_model):
    recipe = tiny_recipe(tiny_model, loop={"steps": 2, "prompts_per_step": 8})
    recipe["algorithm"] = {"type": "sft", "expert_loss": {"type": "dft"}}
    plait(work_folder, "train", write_recipe(work_folder, "sft.yaml", recipe))
    rows = read_lines(work_folder / "runs" / "sft" / "metrics.jsonl")
    steps = [row for row in rows if "main/loss" in row]
    assert len(steps) == 2
    assert all(row["tokens/policy"] == 0 and "reward/mean" not in row for row in steps)


def test_a_grpo_step_that_ends_in_an_error_has_a_clear_message_and_no_leftovers(
    work_folder, tiny_model
):
    """Every score UNKNOWN exceeds the budget: the run stops with a summary, not with zeros."""
    (work_folder / "broken_reward.py").write_text(
        "def grade(prompt, completion):\n    return None\n"
    )
    recipe = tiny_recipe(
        tiny_model, reward=no_verifier("broken_reward:grade"), eval={"num_prompts": 0}
    )
    recipe["algorithm"] = {"type": "grpo", "rollouts_per_prompt": 2}
    write_recipe(work_folder, "unknown.yaml", recipe)
    done = subprocess.run(
        plait_command("train", "unknown.yaml"),
        cwd=work_folder,
        env={**os.environ, "PLAIT_TEST_MARK": "unknown-run"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 5
    assert "RewardError" in done.stderr
    assert "UNKNOWN" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(read_lines(work_folder / "runs" / "unknown" / "unknown_rewards.jsonl")) == 8
    wait_for(lambda: not processes_naming("PLAIT_TEST_MARK=unknown-run"), 30)
