"""A learner that is lost in a run: it goes on as a resumed one, and samples and evaluates nothing twice."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from in_process_run import Dice, believe, everything, parts_of, play, sections

from end_to_end.command_line import no_verifier, tiny_recipe, write_parity, write_recipe
from end_to_end.test_every_algorithm import CONFIGS
from plait.algorithms import ALGORITHMS
from plait.engine import loop
from plait.engine.errors import CheckpointError, LearnerError, LearnerLost, Stalled
from plait.engine.learner import LearnerWorker, Rank
from plait.engine.learners import InProcessRank
from plait.engine.metrics import RunLog
from plait.launch.config import load_recipe

STEPS = 4
QUICK = ("grpo", "sasr", "relift")


class CountedDice(Dice):
    def __init__(self) -> None:
        self.asked: list[int] = []

    def generate(self, requests: Any, *, step: int) -> Any:
        self.asked.append(step)
        return super().generate(requests, step=step)


class Mortal(InProcessRank):
    """Lost when it is called for one of `deaths`, numbers of optimizer steps, and started again without any state."""

    def __init__(self, parts: loop.Parts, recipe: Any, model: Path, deaths: Sequence[int]) -> None:
        self.arguments: Any = (str(model), recipe.learner, parts.algorithm.losses)
        made_for = parts.algorithm
        self.arguments += (made_for.needs, Rank(), made_for.token_sampling, recipe.run.seed)
        self.arguments += (made_for.entropy_top_k, True)
        self.deaths, self.steps, self.restarts, self.stuck = deaths, 0, 0, False
        super().__init__(LearnerWorker(*self.arguments))

    def call(self, method: str, per_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        self.steps += method == "step"
        if method == "step" and self.steps in self.deaths:
            raise LearnerLost("learner rank 0 died in step", stuck=self.stuck)
        return super().call(method, per_rank)

    def restart(self) -> None:
        self.restarts += 1
        self.worker = LearnerWorker(*self.arguments)


@pytest.fixture
def make(tiny_model, tmp_path, monkeypatch):
    """(name of a run, algorithm) -> its recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "sync", believe)
    rows = [
        {"prompt": f"{i} + 1 =", "answer": str(i + 1), "demonstration": f"So {i + 1}."}
        for i in range(16)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_parity(tmp_path)

    def build(name: str, algorithm: str = "grpo") -> Any:
        recipe = tiny_recipe(
            tiny_model,
            run={"name": name, "dir": str(tmp_path), "deterministic": True},
            reward=no_verifier("parity:grade"),
            data={"hint_template": "{prompt} {hint}"},
            loop={"steps": STEPS, "prompts_per_step": 4, "prompts_per_minibatch": 2},
            eval={"num_prompts": 2},
            checkpoint={"every": 2},
        )
        recipe["algorithm"] = sections(algorithm, CONFIGS)
        return load_recipe(tmp_path / write_recipe(tmp_path, f"{name}.yaml", recipe))

    return build


def train_with(recipe: Any, model: Path, deaths: Sequence[int], **change: Any) -> CountedDice:
    dice = CountedDice()
    with parts_of(recipe, dice, model) as parts:
        learners: Any = parts.learners
        learners.ranks = Mortal(parts, recipe, model, deaths)
        learners.ranks.stuck = change.pop("stuck", False)
        config = recipe.loop.model_copy(update=change)
        loop.train(config, recipe.eval, recipe.sampling, parts)
        assert learners.ranks.restarts == len(deaths)
    return dice


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in ALGORITHMS],
)
def test_a_lost_learner_costs_no_sample_and_no_bit(name, make, tiny_model):
    """Lost within the first step, and again beyond a checkpoint; the algorithm itself lives on, with its notes."""
    whole, torn = make(f"{name}-whole", name), make(f"{name}-torn", name)
    calm = train_with(whole, tiny_model, deaths=())
    rough = train_with(torn, tiny_model, deaths=(2, 8))
    assert rough.asked == calm.asked, "all from the journal, and the first evaluation is known"
    expected, found = everything(whole.folder), everything(torn.folder)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == value, key


@pytest.mark.parametrize(("stuck", "kind"), [(False, LearnerError), (True, Stalled)])
def test_restarts_are_counted(make, tiny_model, stuck, kind):
    recipe = make("mortal")
    with pytest.raises(
        kind, match=r"step 2: .*; loop.max_restarts = 1 allows no further"
    ) as caught:
        train_with(recipe, tiny_model, deaths=(2, 5), max_restarts=1, stuck=stuck)
    assert caught.type is kind
    with pytest.raises(LearnerError, match="3 restarts in a row led to no finished step"):
        train_with(recipe, tiny_model, deaths=range(9))


def test_a_disk_that_takes_no_log_is_named(make, tiny_model, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunLog, "record", full)
    with pytest.raises(CheckpointError, match=r"log of the run cannot be written: No space left"):
        play(make("full"), Dice(), tiny_model)
