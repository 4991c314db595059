"""F27: rewards that are all equal, in each group or in the whole batch: no NaN, no stall, and it is counted."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path

import pytest
from in_process_run import Dice, believe, play, sections

from end_to_end.command_line import no_verifier, read_lines, tiny_recipe, write_recipe
from end_to_end.test_every_algorithm import CONFIGS
from plait.algorithms import ALGORITHMS
from plait.engine import loop
from plait.launch.config import load_recipe

STEPS = 2
WITH_GROUPS = [
    name for name, cls in ALGORITHMS.items() if "rollouts_per_prompt" in cls.Config.model_fields
]
QUICK = ("grpo", "prefix_rft")
REWARDS = {
    "zeros": "0.0",
    "ones": "1.0",
    "by_prompt": "float(int(prompt.answer) % 2)",
}
"""Every rollout wrong, every one right, each group one or the other."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("equal")
    rows = [
        {"prompt": f"{i} + 1 =", "answer": str(i + 1), "demonstration": f"Take {i}. So {i + 1}."}
        for i in range(16)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    functions = [
        f"def {name}(prompt, completion):\n    return Score.ok({value}, answer=completion)\n"
        for name, value in REWARDS.items()
    ]
    head = "from plait.engine.types import Score\n\n\n"
    (folder / "equal.py").write_text(head + "\n\n".join(functions))
    return folder


@pytest.mark.parametrize("rewards", REWARDS)
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in WITH_GROUPS],
)
def test_f27_no_nan_no_stall(name, rewards, tiny_model, folder, monkeypatch, measured):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(loop, "sync", believe)
    run = f"{name}-{rewards}"
    recipe = tiny_recipe(
        tiny_model,
        run={"name": run, "dir": str(folder)},
        data={"hint_template": "{prompt} {hint}"},
        reward=no_verifier(f"equal:{rewards}"),
        loop={"steps": STEPS, "prompts_per_step": 4},
        eval={"num_prompts": 2},
    )
    recipe["algorithm"] = sections(name, CONFIGS)
    loaded = load_recipe(folder / write_recipe(folder, f"{run}.yaml", recipe))
    state = play(loaded, Dice(), tiny_model)
    assert state is not None
    assert state.step == STEPS
    assert state.skipped_updates == 0
    rows = [row for row in read_lines(loaded.folder / "metrics.jsonl") if "policy_version" in row]
    assert all(isfinite(value) for row in rows for value in row.values())
    for row in rows:
        if "rollouts/count" in row:
            assert row["groups/uniform"] == 1.0
        outcomes = {k: v for k, v in row.items() if k.startswith("prompts/")}
        assert outcomes.pop("prompts/drawn") == sum(outcomes.values())
    measured("F27", "NaN 0, stalled steps 0, every uniform group counted")
