"""The README's folder with rewards of one's own trains as written; so does a function of Python code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from end_to_end.command_line import plait, read_lines

SMALL = (
    "loop.steps=1",
    "loop.prompts_per_step=4",
    "algorithm.rollouts_per_prompt=4",
    "rollouts.max_prompt_length=64",
    "rollouts.max_response_length=16",
    "rollouts.kv_cache_gib=0.5",
    "eval.num_prompts=4",
)
SCRIPT = """
import sys
import plait

word = "a"
summary = plait.train(
    "recipe.yaml",
    [*sys.argv[1:], "run.name=object", "reward.gold_samples=0"],
    reward=lambda prompt, text: float(word in text),
)
assert summary["steps"] == 1, summary
"""


def code_blocks(page: str, heading: str) -> list[str]:
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [block.split("\n", 1)[1] for block in section.split("```")[1::2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    page = (Path(__file__).parents[2] / "README.md").read_text()
    code, recipe = code_blocks(page, "Your own reward")
    (folder / "my_rewards.py").write_text(code)
    (folder / "recipe.yaml").write_text(recipe)
    rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(12)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_folder_of_the_readme_trains(folder: Path) -> None:
    done = plait(folder, "train", "recipe.yaml", *SMALL)
    assert "gold answers right" in done.stdout
    rows = read_lines(folder / "runs" / "recipe" / "rollouts" / "step-000001.jsonl")
    assert len(rows) == 16
    for row in rows:
        brief = float(len(row["text"]) < 40)
        assert row["parts"] == {"my_rewards:brief": brief}
        assert row["shaping"] == pytest.approx(0.1 * brief)
        assert row["reward"] == float(row["answer"] in row["text"])


def test_a_function_of_python_code_trains(folder: Path, tiny_model: Path) -> None:
    (folder / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py", *SMALL, f"model={tiny_model}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_lines(folder / "runs" / "object" / "rollouts" / "step-000001.jsonl")
    assert all(row["reward"] == float("a" in row["text"]) for row in rows)
