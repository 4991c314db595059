"""Bad input: one clear message, exit code 2, within 5 seconds, before any worker starts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROWS = [
    {"prompt": f"What is {i} + {i}?", "answer": str(2 * i), "demonstration": f"\\boxed{{{2 * i}}}"}
    for i in range(8)
]


def write_rows(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def recipe(tmp_path, tiny_model) -> dict:
    """A recipe that is right, for tests to break."""
    write_rows(tmp_path / "data.jsonl", ROWS)
    return {
        "run": {"name": "broken", "dir": str(tmp_path / "runs")},
        "model": str(tiny_model),
        "algorithm": {"type": "chord", "rollouts_per_prompt": 2, "expert_rows_per_step": 2},
        "data": {"type": "jsonl", "path": str(tmp_path / "data.jsonl")},
        "reward": "exact",
        "loop": {"steps": 1, "prompts_per_step": 2},
        "eval": {"num_prompts": 2},
    }


def run_plait(tmp_path: Path, recipe: dict, command: str = "train") -> tuple[int, str, float]:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "plait.launch", *command.split(), str(file)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - start


BREAKS = {
    "unknown key": (
        lambda r, d: r["algorithm"].update(rollout_per_prompt=4),
        ["algorithm.rollout_per_prompt", "did you mean 'rollouts_per_prompt'"],
    ),
    "unknown section": (lambda r, d: r.update(learnr={}), ["learnr", "did you mean 'learner'"]),
    "wrong type": (lambda r, d: r["loop"].update(steps="many"), ["loop.steps = 'many'", "integer"]),
    "negative size": (
        lambda r, d: r.update(learner={"max_tokens_per_micro_batch": -1}),
        ["learner.max_tokens_per_micro_batch = -1", "greater than or equal to 1"],
    ),
    "minibatch that does not divide": (
        lambda r, d: r["loop"].update(prompts_per_step=10, prompts_per_minibatch=4),
        ["prompts_per_minibatch = 4", "does not divide", "prompts_per_step = 10"],
    ),
    "missing required": (lambda r, d: r.pop("loop"), ["loop", "required"]),
    "no such algorithm": (
        lambda r, d: r["algorithm"].update(type="chrod"),
        ["algorithm.type = 'chrod'", "chord"],
    ),
    "missing model path": (
        lambda r, d: r.update(model="./no/such/model"),
        ["model.path = './no/such/model'"],
    ),
    "model folder without config": (
        lambda r, d: ((d / "empty").mkdir(), r.update(model=str(d / "empty"))),
        ["model.path", "config.json"],
    ),
    "empty data set": (lambda r, d: write_rows(d / "data.jsonl", []), ["data.jsonl", "empty"]),
    "missing data file": (
        lambda r, d: r["data"].update(path="nowhere.jsonl"),
        ["data.path = 'nowhere.jsonl'", "no such file"],
    ),
    "row without prompt": (
        lambda r, d: write_rows(d / "data.jsonl", [*ROWS, {"answer": "4"}]),
        ["data.jsonl", "line 9", "prompt"],
    ),
    "broken JSON": (
        lambda r, d: (d / "data.jsonl").write_text('{"prompt": "a"\n'),
        ["line 1", "broken JSON"],
    ),
    "no such reward": (
        lambda r, d: r.update(reward="exactt"),
        ["reward.function = 'exactt'", "did you mean 'exact'"],
    ),
    "no such reward module": (
        lambda r, d: r.update(reward="nowhere:grade"),
        ["reward.function = 'nowhere:grade'", "no module 'nowhere'"],
    ),
    "demonstrations absent": (
        lambda r, d: write_rows(d / "data.jsonl", [{"prompt": row["prompt"]} for row in ROWS]),
        ["chord", "none of the 6 data rows has one"],
    ),
    "a demonstration missing for sft": (
        lambda r, d: (
            r.update(algorithm={"type": "sft"}),
            write_rows(d / "data.jsonl", [*ROWS[:-1], {"prompt": "9?"}, {"prompt": "8?"}, {"prompt": "7?"}]),
        ),
        ["'sft' trains the demonstration of every prompt"],
    ),
    "contradicting lengths": (
        lambda r, d: r.update(
            learner={"max_tokens_per_micro_batch": 100}, rollouts={"max_prompt_length": 90, "max_response_length": 20}
        ),
        ["learner.max_tokens_per_micro_batch = 100", "rollouts.max_prompt_length", "110"],
    ),
    "bfloat16 without ZeRO": (
        lambda r, d: r.update(learner={"dtype": "bfloat16", "zero_stage": 0}),
        ["dtype = bfloat16", "zero_stage"],
    ),
    "nccl on cpu": (
        lambda r, d: r.update(rollouts={"weight_sync": "nccl"}),
        ["rollouts.weight_sync = 'nccl'", "rollouts.device = cpu"],
    ),
    "no reward": (lambda r, d: r.pop("reward"), ["reward", "required"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_bad_input_is_one_clear_message(name, recipe, tmp_path):
    break_recipe, words = BREAKS[name]
    break_recipe(recipe, tmp_path)
    code, output, seconds = run_plait(tmp_path, recipe)
    assert code == 2, output
    assert "Traceback" not in output
    for word in words:
        assert word in output
    assert not (tmp_path / "runs").exists(), "nothing was started or written"
    assert seconds < 5


def test_the_recipe_that_the_others_break_is_right(recipe, tmp_path):
    code, output, _ = run_plait(tmp_path, recipe, "check recipe")
    assert (code, output) == (0, "ok: 6 training prompts, 2 held out\n")


def test_all_problems_are_named_at_once(recipe, tmp_path):
    recipe["loop"]["steps"] = 0
    recipe["algorithm"]["clip_low"] = -1
    recipe["data"]["colums"] = {}
    _, output, _ = run_plait(tmp_path, recipe)
    for path in ("loop.steps = 0", "algorithm.clip_low = -1", "data.colums"):
        assert path in output


def test_an_existing_run_is_not_touched(recipe, tmp_path):
    folder = tmp_path / "runs" / "broken"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("precious")
    code, output, _ = run_plait(tmp_path, recipe)
    assert code == 2
    assert "already holds a run" in output
    assert (folder / "config.yaml").read_text() == "precious"
