"""B11: how costs grow, as the exponent of a power law between the smallest and the largest size.

Learner: one optimizer step against a bare loop of PyTorch on the same rows, by sequence length, four rows each.
Workers: a step of the real loop with 1 to 32 idle workers, each of which draws four samples that sleep half a second.
Data: from the recipe to the first prompts of a run, and of a resumed one, by rows of a JSONL file.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bare_loop import ALGORITHM, BareLoop, cut
from figures import at_most
from harness import Session
from idle_run import GROUP_SIZE, idle_ranks, step_seconds
from idle_workers import SECONDS
from plait.engine.batch import collate
from plait.engine.types import Update
from plait.launch.cluster import ray_cluster
from shapes import learner_group, make_groups, small_model

LENGTHS = (128, 256, 512, 1024)
WORKERS = (1, 8, 32)
ROWS = (1_000, 4_000, 16_000)
REPETITIONS = 5
PAIRS = 12
FLAT = at_most(0.1)


def measure(session: Session) -> None:
    with TemporaryDirectory() as folder:
        measure_data(session, Path(folder))
        measure_learner(session, Path(folder))
        os.environ[SECONDS] = "0.5"
        with ray_cluster(), idle_ranks() as ranks:
            measure_workers(session, Path(folder), ranks)


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure_learner(session: Session, folder: Path) -> None:
    lengths = LENGTHS[:2] if session.quick else LENGTHS
    model = small_model(folder / "model")
    rows = {n: make_groups(n, 2, 2, n // 4, [n - n // 4]) for n in lengths}
    engine = learner_group(
        model, ALGORITHM, max_tokens_per_micro_batch=4 * max(lengths), share_prefixes=False
    )
    bare, batches = BareLoop(model), {n: cut(rows[n], 4 * max(lengths))[0] for n in lengths}

    def ours(n: int) -> None:
        engine.update(collate(rows[n]), Update(tuple(rows[n]), "main", {}), step=0)

    ratios = []
    found: dict[str, list[float]] = {"ours": [], "bare": []}
    for repetition in range(-1, 2 if session.quick else PAIRS):
        seconds: dict[str, list[float]] = {"ours": [], "bare": []}
        for place, n in enumerate(lengths):
            sides = {"ours": lambda n=n: ours(n), "bare": lambda n=n: bare.step(batches[n])}
            for name in sorted(sides, reverse=(repetition + place) % 2 == 1):
                seconds[name].append(timed(sides[name]))
        if repetition < 0:
            continue  # warm-up
        both = {name: exponent(lengths, times) for name, times in seconds.items()}
        found = {name: [*found[name], both[name]] for name in found}
        ratios.append(both["ours"] / both["bare"])
    said = ", ".join(f"{name} {np.median(values):.2f}" for name, values in found.items())
    session.derive(
        "learner by sequence length, exponent of ours / bare loop",
        ratios,
        target=at_most(1.05),
        at_least=PAIRS,
        note=f"{lengths[0]} to {lengths[-1]} tokens; exponents: {said}",
    )


def measure_workers(session: Session, folder: Path, ranks: Any) -> None:
    workers, steps = ((1, 2), 2) if session.quick else (WORKERS, 8)
    seconds = {
        n: step_seconds(folder / "workers", ranks, n, n * 4 // GROUP_SIZE, steps, warm=2)
        for n in workers
    }
    exponents = [exponent(workers, [seconds[n][i] for n in workers]) for i in range(steps)]
    medians = ", ".join(f"{n}: {np.median(s):.3f}" for n, s in seconds.items())
    session.derive(
        "step by workers, each with its share of samples",
        exponents,
        target=FLAT,
        note=f"seconds a step by workers: {medians}",
    )


def measure_data(session: Session, folder: Path) -> None:
    sizes = ROWS[:2] if session.quick else ROWS
    recipes = {n: write_recipe(folder, n) for n in sizes}
    later = {n: first_prompts(recipes[n], prompts=n // 2) for n in sizes}
    for name, states in (("start", dict.fromkeys(sizes)), ("resume half through", later)):
        repeated = []
        for _ in range(1 if session.quick else REPETITIONS):
            found = []
            for n in sizes:
                started = time.perf_counter()
                first_prompts(recipes[n], states[n])
                found.append(time.perf_counter() - started)
            repeated.append(found)
        middle = zip(sizes, np.median(repeated, 0), strict=True)
        medians = ", ".join(f"{n}: {seconds:.2f}" for n, seconds in middle)
        session.derive(
            f"{name}, by rows of data",
            [exponent(sizes, seconds) for seconds in repeated],
            target=FLAT,
            note=f"recipe to first prompts, without workers; seconds by rows: {medians}",
        )


def write_recipe(folder: Path, rows: int) -> Any:
    from plait.launch.config import load_recipe
    from tiny_model import make_tiny_model

    data = folder / f"{rows}.jsonl"
    with data.open("w") as file:
        for i in range(rows):
            text = f"{'one two three four five six seven eight nine ten ' * 4}{i} + 1 ="
            file.write(json.dumps({"prompt": text, "answer": str(i + 1)}) + "\n")
    model = folder / "tiny"
    if not model.exists():
        make_tiny_model(model)
    recipe = {
        "run": {"name": f"rows-{rows}", "dir": str(folder)},
        "model": str(model),
        "algorithm": {"type": "grpo"},
        "data": {"type": "jsonl", "path": str(data)},
        "reward": "exact",
        "rollouts": {"max_prompt_length": 512, "max_response_length": 64},
        "loop": {"steps": 100, "prompts_per_step": 8},
        "eval": {"num_prompts": 64},
    }
    path = folder / f"{rows}.json"  # JSON is YAML
    path.write_text(json.dumps(recipe))
    return load_recipe(str(path))


def first_prompts(recipe: Any, state: Any = None, prompts: int = 8) -> Any:
    """What a run does with its data before its first step; a resumed one goes on at `state`. Returns the place."""
    from plait.launch.run import check_inputs, load_prompts

    torch.set_num_threads(1)
    data = load_prompts(check_inputs(recipe), recipe.model.path)
    if state is not None:
        data.load_state_dict(state)
    data.take(prompts)
    return data.state_dict()
