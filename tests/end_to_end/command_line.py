"""A recipe for the tiny model, and the command line as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml


def write_parity(folder: Path, seconds: float = 0.0) -> None:
    """`parity:grade`, which a random model sometimes earns, so that groups have a signal; a call takes `seconds`."""
    (folder / "parity.py").write_text(
        "import time\n\nfrom plait.engine.types import Score\n\n"
        "def grade(prompt, completion):\n"
        f"    time.sleep({seconds})\n"
        "    return Score.ok(len(completion) % 2, answer=completion)\n"
    )


def no_verifier(function: str) -> dict:
    """A reward whose numbers say nothing of answers, so it has no gold test to pass."""
    return {"function": function, "gold_samples": 0}


def tiny_recipe(model: Path, **sections) -> dict:
    recipe = {
        "model": str(model),
        "algorithm": {"type": "chord", "rollouts_per_prompt": 3, "expert_rows_per_step": 4, "mu_decay_steps": 4},
        "data": {"type": "jsonl", "path": "data.jsonl"},
        "reward": "exact",
        "rollouts": {"max_prompt_length": 48, "max_response_length": 12, "kv_cache_gib": 0.1, "num_cpus": 1},
        "learner": {"learning_rate": 1e-3, "max_tokens_per_micro_batch": 256, "num_cpus": 1},
        "loop": {"steps": 3, "prompts_per_step": 4},
        "eval": {"num_prompts": 6},
    }  # fmt: skip
    for name, section in sections.items():
        default = recipe.get(name, {})
        merges = isinstance(section, dict) and isinstance(default, dict)
        recipe[name] = {**default, **section} if merges else section
    return recipe


def plait(folder: Path, *args: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command line in `folder`; a failure shows its output."""
    done = subprocess.run(
        plait_command(*args), cwd=folder, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def plait_command(*args: str) -> list[str]:
    return [sys.executable, "-m", "plait.launch", *args]


def write_recipe(folder: Path, name: str, recipe: dict) -> str:
    (folder / name).write_text(yaml.safe_dump(recipe))
    return name


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


RAY_AGENTS = (b"ray::DashboardAgent", b"ray::RuntimeEnvAgent")
"""Ray's own helpers notice the end of their cluster only after about a minute."""


def processes_naming(text: str) -> list[int]:
    """Processes whose environment mentions `text`; this one, zombies and RAY_AGENTS left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            command = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes()
        except (OSError, IndexError):
            continue  # it has ended meanwhile
        if state != "Z" and not command.startswith(RAY_AGENTS) and text.encode() in environment:
            found.append(int(entry.name))
    return found
