"""F16: a run that is interrupted at every step, anywhere in it, ends as the one that never was: the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from in_process_run import (
    Dice,
    Interrupted,
    believe,
    everything,
    play,
    prompts_of,
    sections,
    strike,
)

from end_to_end.command_line import (
    no_verifier,
    plait,
    plait_command,
    tiny_recipe,
    write_parity,
    write_recipe,
)
from end_to_end.test_every_algorithm import CONFIGS
from plait.algorithms import ALGORITHMS
from plait.engine import loop
from plait.engine.failpoints import VARIABLE
from plait.launch.config import load_recipe
from plait.rollouts.pool import Pool

STEPS = 4
QUICK = ("grpo", "relift", "stages")
"""Those that `make test` takes: one plain, one with a buffer and two optimizers, one that changes its loss."""


class HalfWay:
    """The pool, which a run loses after `number` samples."""

    def __init__(self, pool: Any, number: int) -> None:
        self.pool, self.number = pool, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pool, name)

    def generate(self, requests: Any, *, step: int) -> Any:
        for rollout in self.pool.generate(requests, step=step):
            yield rollout
            self.number -= 1
            if self.number == 0:
                raise Interrupted


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exact")
    rows = [
        {
            "prompt": f"{i} + {j} =",
            "answer": str(i + j),
            "demonstration": f"Take {i}. Add {j}. So {i + j}.",
        }
        for i in range(5)
        for j in range(4)
    ]
    (folder / "solutions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_parity(folder)
    return folder


def make_recipe(folder: Path, model: Path, run: str, name: str, **changes: Any) -> Any:
    folder.mkdir(exist_ok=True)
    recipe = tiny_recipe(
        model,
        run={"name": run, "dir": str(folder), "deterministic": True, "seed": 3},
        data={"path": "solutions.jsonl", "hint_template": "{prompt} {hint}"},
        reward=no_verifier("parity:grade"),
        rollouts={"max_response_length": 14},
        # 18 training prompts: every run begins a second epoch.
        loop={"steps": STEPS, "prompts_per_step": 5},
        eval={"num_prompts": 2, "every": 2},
        checkpoint={"every": 1, "keep": 2},
        **changes,
    )
    recipe["algorithm"] = sections(name, CONFIGS)
    return load_recipe(folder / write_recipe(folder, f"{run}.yaml", recipe))


@pytest.fixture(scope="module")
def pool(ray_session, tiny_model, folder):
    recipe = make_recipe(folder, tiny_model, "pool", "grpo")
    opened = Pool(str(tiny_model), recipe.samplers, dtype="float32", seed=recipe.run.seed)
    opened.wait_started()
    yield opened
    opened.close()


def interrupted_everywhere(recipe: Any, pool: Any, model: Path) -> int:
    """Ends in step 1 while it samples, in 2 before its update, in 3 after it, in 4 before the update; then goes on."""
    cuts = [
        partial(play, recipe, HalfWay(pool, 7), model, strike("step.updated", 1)),
        partial(play, recipe, pool, model, strike("step.journaled", 2)),
        partial(play, recipe, pool, model, strike("step.updated", 2)),
        partial(play, recipe, pool, model, strike("step.journaled", 2)),
    ]
    ended = sum(cut() is None for cut in cuts)
    state = play(recipe, pool, model)
    assert state is not None
    assert state.step == STEPS
    return ended


def check(name: str, pool: Any, model: Path, folder: Path) -> None:
    """One run as it is, one that is interrupted everywhere: equal, with each prompt drawn when it was due."""
    whole = make_recipe(folder, model, f"{name}-whole", name)
    cut = make_recipe(folder, model, f"{name}-cut", name)
    state = play(whole, pool, model)
    assert state is not None
    assert state.policy_version > 0
    assert interrupted_everywhere(cut, pool, model) >= 3
    expected, found = everything(whole.folder), everything(cut.folder)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == value, key
    drawn, position = prompts_of(cut.folder), found["state"]["data"]["prompts"]["drawn"]
    assert len(drawn) == sum(position), "the record holds every prompt that left the stream, once"
    assert drawn == prompts_of(whole.folder)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in ALGORITHMS],
)
def test_resumed_anywhere_scripted_samples_end_in_the_same_bits(
    name, tiny_model, folder, monkeypatch
):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(loop, "sync", believe)
    check(name, Dice(), tiny_model, folder / "scripted")


@pytest.mark.long
@pytest.mark.parametrize("name", ALGORITHMS)
def test_f16_resumed_anywhere_it_ends_in_the_same_bits(
    name, pool, tiny_model, folder, monkeypatch, measured
):
    monkeypatch.chdir(folder)
    check(name, pool, tiny_model, folder)
    measured("F16", "max abs difference 0, prompts repeated or skipped 0 (real vLLM and DeepSpeed)")


@pytest.mark.long
def test_f16_a_killed_process_is_verified_and_resumed(tiny_model, folder, measured):
    """The whole command, learner and sampler in processes of their own; SIGKILL between update and weight sync."""
    runs = {}
    for run, failpoint in (("real-whole", None), ("real-cut", "kill:step.updated:3")):
        recipe = make_recipe(folder, tiny_model, run, "relift")
        runs[run] = recipe.folder
        env = {**os.environ, VARIABLE: failpoint} if failpoint else dict(os.environ)
        done = subprocess.run(
            plait_command("train", f"{run}.yaml", "checkpoint.every=2"),
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == (-signal.SIGKILL if failpoint else 0), done.stderr[-3000:]
    said = plait(folder, "resume", str(runs["real-cut"]), "--verify").stdout
    assert "verified: step" in said
    expected, found = everything(runs["real-whole"]), everything(runs["real-cut"])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == value, key
    measured("F16", "a killed `plait train` resumed and verified by the command line: equal")
