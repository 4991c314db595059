"""`plait check data` finds what was planted, and nothing else."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.planted import LIMITS, NUM_EVAL, NUM_ROWS, plant
from end_to_end.command_line import plait_command, read_lines, tiny_recipe, write_recipe
from plait.launch.check_data import check_data
from plait.launch.config import load_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model) -> Path:
    return tmp_path_factory.mktemp("planted")


@pytest.fixture(scope="module")
def planted(folder, tiny_model) -> list[Any]:
    from transformers import AutoTokenizer

    return plant(folder, AutoTokenizer.from_pretrained(tiny_model))


def recipe_file(folder: Path, tiny_model: Path, **data: Any) -> str:
    recipe = tiny_recipe(
        tiny_model,
        data={"path": "planted.jsonl", **data},
        rollouts=LIMITS,
        learner={"max_tokens_per_micro_batch": 512},
        eval={"num_prompts": NUM_EVAL},
    )
    return write_recipe(folder, "recipe.yaml", recipe)


def test_the_command_finds_20_of_20_and_passes_clean_rows(folder, planted, tiny_model) -> None:
    recipe = recipe_file(folder, tiny_model)
    command = plait_command("check", "data", recipe, "--json", "--output", "q/bad.jsonl")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert len(planted) == 20
    assert [(f["prompt_id"], f["place"], f["reason"]) for f in sorted_(found["findings"])] == (
        sorted(planted, key=str)
    )
    data, admission = found["data"], found["admission"]
    assert (
        data["rows"] == NUM_ROWS == data["kept"] + data["held_out"] + sum(data["dropped"].values())
    )
    demonstrations = NUM_ROWS - NUM_EVAL + 3
    assert admission["demonstrations"] == demonstrations
    assert admission["admitted"] + sum(admission["dropped"].values()) == demonstrations
    assert admission["findings"] == Counter(p[2] for p in planted)
    graded = [admission[name] for name in ("right", "wrong", "unknown", "not_graded")]
    assert graded == [demonstrations - 6, 2, 2, 2]  # those with a control token are not graded
    listed = read_lines(folder / "q" / "bad.jsonl")
    acted = [p for p in planted if admission["actions"][p[2]] != "keep"]
    assert sorted(line["prompt_id"] for line in listed) == sorted(name for name, _, _ in acted)
    assert all(line["row"]["messages"] for line in listed)
    assert sum("demonstration" in line["row"] for line in listed) == len(acted) - 1


def sorted_(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(findings, key=lambda f: str((f["prompt_id"], f["place"], f["reason"])))


def test_the_table_is_for_people(folder, planted, tiny_model) -> None:
    recipe = recipe_file(folder, tiny_model, admission={"foreign_template": "drop"})
    command = plait_command("check", "data", recipe)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "planted.jsonl" in done.stdout
    assert "duplicate_prompt" in done.stdout
    assert "75 demonstrations: 64 admitted, 11 dropped (1 eval_copy, " in done.stdout
    assert "1 rows leave the training set (1 eval_copy)" in done.stdout


def test_without_a_reward_nothing_is_graded(folder, planted, tiny_model, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    overrides = ["reward=null", "eval.num_prompts=0", "algorithm={type: sft}"]
    found = check_data(load_recipe(recipe_file(folder, tiny_model), overrides))
    report = found.admission.report
    assert (report.right, report.wrong, report.unknown) == (0, 0, 0)
    assert report.not_graded == report.demonstrations == NUM_ROWS + 3
    assert not {"wrong", "unknown", "eval_copy", "eval_overlap"} & report.findings.keys()
