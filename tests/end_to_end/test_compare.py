"""A comparison of two methods with two seeds: real Ray, real vLLM, real DeepSpeed, the tiny model."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from end_to_end.command_line import (
    no_verifier,
    plait,
    plait_command,
    read_lines,
    tiny_recipe,
    write_recipe,
)

COMMAND = (
    *("compare", "base.yaml", "--algorithms", "grpo,sft", "--budget", "tokens=150"),
    *("--seeds", "2", "--output", "out"),
)


@pytest.fixture(scope="module")
def compared(work_folder, tiny_model) -> tuple[Path, str]:
    recipe = tiny_recipe(
        tiny_model, reward=no_verifier("parity:grade"), loop={"steps": 20}, eval={"every": 1}
    )
    write_recipe(work_folder, "base.yaml", recipe)
    output = plait(work_folder, *COMMAND, timeout=600).stdout
    return work_folder / "out", output


def test_every_run_gets_the_budget_and_no_more_than_a_step_beyond_it(compared):
    folder, _ = compared
    report = json.loads((folder / "report.json").read_text())
    assert [method["label"] for method in report["methods"]] == ["grpo", "sft"]
    for method in report["methods"]:
        assert [run["seed"] for run in method["runs"]] == [0, 1]
        for run in method["runs"]:
            assert not run["failure"]
            assert run["ended_by"] == "max_trained_tokens"
            trained = run["policy_tokens"] + run["expert_tokens"]
            rows = read_lines(folder / run["folder"] / "metrics.jsonl")
            steps = [row["tokens/trained_so_far"] for row in rows if "tokens/trained_so_far" in row]
            assert steps[-1] == trained >= 150 > steps[-2]
            assert len(run["curve"]) == run["steps"] + 1
            assert (run["policy_tokens"] == 0) == (method["label"] == "sft")
            assert run["prompts"] == 4 * run["steps"]


def test_methods_start_from_the_same_weights_and_data(compared):
    """The pool that stays up serves each run's own initial weights: the first evaluation is the same, text by text."""
    folder, _ = compared
    for seed in (0, 1):
        texts = [
            [
                row["text"]
                for row in read_lines(folder / "runs" / name / "rollouts/eval-000000.jsonl")
            ]
            for name in (f"grpo-{seed}", f"sft-{seed}")
        ]
        assert sorted(texts[0]) == sorted(texts[1])


def test_the_report_is_written_and_models_are_not_kept(compared):
    folder, output = compared
    text = (folder / "report.md").read_text()
    assert text in output
    assert "plait compare base.yaml --algorithms grpo,sft" in text
    assert (folder / "curves.svg").read_text().count("<polyline") == 6
    assert not list(folder.glob("runs/*/checkpoints"))
    assert not list(folder.glob("runs/*/export"))


def test_the_same_command_continues_and_a_failed_run_is_a_row(compared, tmp_path):
    """Finished runs are kept as they are; one is made to fail, by a learning rate that cannot hold."""
    folder, _ = compared
    work = folder.parent
    kept = (folder / "runs" / "grpo-0" / "summary.json").stat().st_mtime_ns
    (folder / "runs" / "sft-1" / "summary.json").unlink()
    plait(work, *COMMAND, timeout=300)
    assert (folder / "runs" / "grpo-0" / "summary.json").stat().st_mtime_ns == kept
    assert (folder / "runs" / "sft-1" / "summary.json").exists()
    (work / "variants.yaml").write_text(
        "bad: {algorithm: {type: sft}, overrides: [learner.learning_rate=1.0e+30]}\n"
    )
    arguments = list(COMMAND)
    arguments[arguments.index("grpo,sft")] = "bad,grpo"
    done = subprocess.run(
        plait_command(*arguments, "--variants", "variants.yaml"),
        cwd=work, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    report = (folder / "report.md").read_text()
    assert re.search(r"\| bad \| failed: (LearnerError|WeightSyncError): ", report), report
    assert (folder / "runs" / "grpo-0" / "summary.json").stat().st_mtime_ns == kept
