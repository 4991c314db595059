"""F40: the clock, the hash seed and the threads of the surroundings do not show in the bits of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from in_process_run import Dice, believe, everything, play, sections

from end_to_end.command_line import no_verifier, tiny_recipe, write_recipe
from plait.engine import loop
from plait.launch.config import load_recipe

DAY = 86400.0
SURROUNDINGS: dict[str, dict[str, str]] = {
    "plain": {"PYTHONHASHSEED": "0"},
    "hash seed": {"PYTHONHASHSEED": "4711"},
    "threads": {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
    "clock ahead": {"PYTHONHASHSEED": "0", "PLAIT_TEST_CLOCK": str(400 * DAY)},
    "clock back": {"PYTHONHASHSEED": "0", "PLAIT_TEST_CLOCK": str(-400 * DAY)},
}


@pytest.mark.long
def test_f40_same_bits_whatever_surrounds_it(tiny_model, tmp_path, measured):
    rows = [
        {"prompt": f"{i} + 1 =", "answer": str(i + 1), "demonstration": f"Take {i}. So {i + 1}."}
        for i in range(16)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Iterates over a set: what a reward in Python may do.
    (tmp_path / "letters.py").write_text(
        "def grade(prompt, completion):\n"
        "    return float(len(''.join(set(completion.split()))) % 2)\n"
    )
    found: dict[str, dict[str, Any]] = {}
    for name, env in SURROUNDINGS.items():
        folder = tmp_path / name.replace(" ", "-")
        recipe = tiny_recipe(
            tiny_model,
            run={"name": "run", "dir": str(folder), "deterministic": True},
            reward=no_verifier("letters:grade"),
            loop={
                "steps": 3,
                "prompts_per_step": 4,
                "prompts_per_minibatch": 2,
                "gradient_every": 1,
            },
            eval={"num_prompts": 2},
            checkpoint={"every": 1},
        )
        recipe["algorithm"] = sections("sasr", {"sasr": {"warmup_steps": 1}})
        write_recipe(tmp_path, "recipe.yaml", recipe)
        path = os.pathsep.join(filter(None, sys.path))
        done = subprocess.run(
            [sys.executable, __file__, str(tiny_model)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, **env},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = everything(folder / "run")
    for name, run in found.items():
        for key, value in found["plain"].items():
            assert run[key] == value, (name, key)
    measured(
        "F40", f"bits equal {len(found)}/{len(found)}: clock, hash seed, threads of the environment"
    )


def jump(seconds: float) -> None:
    """From the second step on the wall clock shows another time; nothing else can move a monotonic one."""
    real, reach = time.time, loop.reach

    def moved(place: str) -> None:
        time.time = lambda: real() + seconds
        reach(place)

    loop.reach = moved


if __name__ == "__main__":
    loop.sync = believe
    if "PLAIT_TEST_CLOCK" in os.environ:
        jump(float(os.environ["PLAIT_TEST_CLOCK"]))
    play(load_recipe(Path("recipe.yaml")), Dice(), Path(sys.argv[1]))
