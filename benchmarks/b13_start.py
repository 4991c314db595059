"""B13: from the command to the first step, cold and resumed, and what a checkpoint takes from training.

Start: fresh processes on a tiny model, in turns: one that only loads it with transformers and vLLM, a new run, a
resumed one; from the start of the process to the moment its first step begins. Checkpoint: SmolLM2-135M in bfloat16
with float32 master weights, one learner rank in this process, which takes steps while the checkpoint is written.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from figures import at_most
from first_step import MARK
from harness import MIN_PAIRS, Session
from plait.algorithms import Setup
from plait.algorithms.grpo import Grpo, GrpoConfig
from plait.engine.batch import collate
from plait.engine.checkpoint import Checkpoints
from plait.engine.config import CheckpointConfig
from plait.engine.run_state import RunState
from plait.engine.types import Sampling, Update
from plait.launch.model import resolve_model
from shapes import learner_group, make_groups
from tiny_model import make_tiny_model

MODEL = "smollm2-135m-instruct"
INTERVAL, SAVES = 10, 6
LIMIT = 120.0
"""Seconds of one start."""


def measure(session: Session) -> None:
    with TemporaryDirectory(dir=Path.cwd() / "build") as folder:
        measure_starts(session, Path(folder))
        measure_checkpoints(session, Path(folder) / "checkpoints")


def seconds_until_ready(*arguments: str) -> float:
    """Raises RuntimeError with what the process said where it never was."""
    script = str(Path(__file__).with_name("first_step.py"))
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, timeout=LIMIT
    )
    marks = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not marks:
        raise RuntimeError(f"{arguments}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return float(marks[0].removeprefix(MARK)) - started


def measure_starts(session: Session, folder: Path) -> None:
    model = make_tiny_model(folder / "tiny", heads=2, kv_heads=1)
    fresh = write_recipe(folder, model, "fresh", steps=2)
    stopped = write_recipe(folder, model, "stopped", steps=1)
    command = [sys.executable, "-m", "plait.launch", "train", stopped]
    subprocess.run(command, check=True, timeout=LIMIT)
    ways: dict[str, tuple[str, str]] = {
        "load": ("load", str(model)),
        "cold": ("train", fresh),
        "resumed": ("resume", str(folder / "stopped")),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    repetitions = 1 if session.quick else MIN_PAIRS
    for repetition in range(repetitions):
        order = list(ways) if repetition % 2 == 0 else list(reversed(ways))
        for name in order:
            found[name].append(seconds_until_ready(*ways[name]))
    cold = [a - b for a, b in zip(found["cold"], found["load"], strict=True)]
    medians = {name: sorted(values)[len(values) // 2] for name, values in found.items()}
    note = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in medians.items())
    name = "start to step 1, less what transformers and vLLM take to load"
    session.derive(name, cold, target=at_most(5), unit="s", note=note, at_least=MIN_PAIRS)
    ratios = [a / b for a, b in zip(found["resumed"], found["cold"], strict=True)]
    session.derive(
        "resume / cold start", ratios, target=at_most(1.2), note=note, at_least=MIN_PAIRS
    )


def write_recipe(folder: Path, model: Path, name: str, steps: int) -> str:
    data = folder / "data.jsonl"
    if not data.exists():
        rows = ({"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(64))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "run": {"name": name, "dir": str(folder)},
        "model": str(model),
        "algorithm": {"type": "grpo", "rollouts_per_prompt": 4},
        "data": {"type": "jsonl", "path": str(data)},
        "reward": "exact",
        "rollouts": {"max_prompt_length": 48, "max_response_length": 12, "kv_cache_gib": 0.1},
        "loop": {"steps": steps, "prompts_per_step": 4},
        "eval": {"num_prompts": 0},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return str(path)


class Nothing:
    """Data and algorithm have no state here."""

    def state_dict(self) -> dict[str, Any]:
        return {}


def measure_checkpoints(session: Session, folder: Path) -> None:
    algorithm = Grpo(GrpoConfig(), Setup(Sampling(64)))
    learners = learner_group(
        Path(resolve_model(MODEL)),
        algorithm,
        dtype="bfloat16",
        zero_stage=1,
        max_tokens_per_micro_batch=2048,
    )
    rows = make_groups(0, num_prompts=4, group_size=8, prompt_tokens=32, lengths=[32])
    update = Update(tuple(rows), "main", {})
    checkpoints = Checkpoints(folder, CheckpointConfig())
    nothing: Any = Nothing()

    def step() -> None:
        learners.update(collate(rows), update, step=0)

    step()
    bare, held, slower, verified = [], [], [], []
    for number in range(1, (2 if session.quick else SAVES) + 1):
        bare.append(min(seconds(step), seconds(step)))
        save = RunState(step=number)
        stall = seconds(lambda save=save: checkpoints.save(save, nothing, nothing, learners))
        beside = []
        while learners.saved(wait=False) is None:
            beside.append(seconds(step))
        held.append(stall + seconds(lambda: checkpoints.settle(wait=True)))
        slower.append(sum(beside) - len(beside) * bare[-1])
        verified.append(seconds(checkpoints.latest))
    size = sum(f.stat().st_size for f in checkpoints.complete()[-1].rglob("*") if f.is_file())
    step_seconds = sorted(bare)[len(bare) // 2]
    window = INTERVAL * step_seconds
    note = f"{size / 1e6:.0f} MB; a step of {sum(map(len, rows))} tokens takes {step_seconds:.2f} s"
    session.derive(
        f"stall of training, a checkpoint each {INTERVAL} steps",
        [seconds / window for seconds in held],
        target=at_most(0.02),
        note=note,
    )
    session.derive(
        "longer steps while it is written, as a share of the same steps",
        [seconds / window for seconds in slower],
        note="the writer shares cores and memory with training",
    )
    session.derive("reading a checkpoint back to verify it", verified, unit="s")


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
