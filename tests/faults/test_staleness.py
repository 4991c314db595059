"""A run that samples the next step while this one trains: which weights sample, what comes of it, and how it ends."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from in_process_run import Dice, believe, everything, parts_of, play, sections, strike

from end_to_end.command_line import no_verifier, tiny_recipe, write_parity, write_recipe
from end_to_end.test_every_algorithm import CONFIGS
from plait.algorithms import ALGORITHMS, Setup
from plait.algorithms.chord import Chord, ChordConfig
from plait.engine import loop
from plait.engine.errors import ConfigError, LearnerError, LearnerLost, Stopped, VersionGone
from plait.engine.types import Rollout, Sampling
from plait.launch.config import load_recipe

STEPS, EVERY = 7, 3
STALE = [0, 1, 1, 0, 1, 1, 0, 0]
"""Age of the weights that sample each step, in updates: nothing crosses the checkpoints after steps 3 and 6. Then
that of the evaluation."""


class Served(Dice):
    """Samples depend on the weights' version too; `late` ages what it serves in the steps of `STALE`."""

    def __init__(self, late: bool = False) -> None:
        self.late = late
        self.versions: dict[int, int] = {}

    def admit(self, version: int, receivers: Any, sync: Any) -> None: ...

    def generate(self, requests: Any, *, step: int) -> Iterator[Rollout]:
        age = STALE[step] if self.late else 0
        self.versions[step] = served = Dice.version - age
        return super().generate(requests, step=step + 1000 * served)


@pytest.fixture
def make(tiny_model, tmp_path, monkeypatch):
    """Recipes of runs in the test's folder."""
    rows = [
        {
            "prompt": f"{i} + 1 =",
            "answer": str(i + 1),
            "demonstration": f"Add 1 to {i}. So {i + 1}.",
        }
        for i in range(20)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_parity(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "sync", believe)

    def build(name: str, algorithm: str = "grpo", staleness: int = 1, **changes: Any) -> Any:
        recipe = tiny_recipe(
            tiny_model,
            run={"name": name, "deterministic": True},
            reward=no_verifier("parity:grade"),
            rollouts={"max_response_length": 14},
            loop={"steps": STEPS, "prompts_per_step": 4, "staleness": staleness},
            eval={"num_prompts": 2, "every": 0},
            checkpoint={"every": EVERY, "keep": 2},
        )
        recipe["algorithm"] = section = sections(algorithm, CONFIGS) | changes
        if "sampler_ratio_cap" in ALGORITHMS[algorithm].Config.model_fields:
            section.setdefault("sampler_ratio_cap", 2.0)
        return load_recipe(tmp_path / write_recipe(tmp_path, f"{name}.yaml", recipe))

    return build


def without_ages(found: dict[str, Any]) -> dict[str, Any]:
    """Less what tells the age of the rollouts."""
    rows = [{k: v for k, v in row.items() if k != "staleness/max"} for row in found["metrics"]]
    found = {key: value for key, value in found.items() if not key.startswith("step-")}
    return {**found, "metrics": rows, "state": found["state"]["run"]["weights"]}


@pytest.mark.parametrize("algorithm", ["chord", "prefix_rft", "uft"])
def test_overlap_changes_the_age_of_the_weights_and_not_a_bit_more(make, tiny_model, algorithm):
    """The same samples, taken in turn from a pool that serves them one version late, train the same weights."""
    ahead, turn = Served(), Served(late=True)
    stale, late = make("stale", algorithm), make("late", algorithm, staleness=0)
    assert play(stale, ahead, tiny_model) is not None
    assert play(late, turn, tiny_model) is not None
    trained = {step: ahead.versions[step] for step in range(STEPS)}
    assert trained == {step: turn.versions[step] for step in range(STEPS)}
    assert trained == {step: step - age for step, age in enumerate(STALE[:STEPS])}
    found, expected = everything(stale.folder), everything(late.folder)
    assert [row["staleness/max"] for row in found["metrics"] if "reward/mean" in row] == STALE[
        :STEPS
    ]
    assert without_ages(found) == without_ages(expected)


@pytest.mark.parametrize("algorithm", ["grpo", "hpt"])
def test_interrupted_anywhere_it_ends_in_the_same_bits(make, tiny_model, algorithm):
    """`hpt` trains by rollouts of two rounds or demonstrations; what was begun ahead is begun ahead again."""
    whole, cut = make("whole", algorithm), make("cut", algorithm)
    assert play(whole, Served(), tiny_model) is not None
    again = partial(play, cut, Served(), tiny_model)
    ended = [
        again(strike("step.journaled", 2)),
        again(strike("step.updated", 2)),
        again(strike("step.updated", 5)),
        again(strike("step.journaled", 4)),
        again(strike("step.updated", 1)),
    ]
    assert ended == [None] * 5
    assert again() is not None
    expected, found = everything(whole.folder), everything(cut.folder)
    assert found == expected


def test_asked_to_stop_between_two_steps_it_goes_on_from_the_journal(make, tiny_model):
    whole, cut = make("whole"), make("cut")
    assert play(whole, Served(), tiny_model) is not None
    with parts_of(cut, Served(), tiny_model) as parts:

        def ask(place: str) -> None:
            if place == "step.updated" and parts.log.at.step == 5:
                parts.stop.ask("SIGTERM")

        reach, loop.reach = loop.reach, ask
        try:
            with pytest.raises(
                Stopped, match=r"SIGTERM after 5 steps.*last checkpoint and its journal"
            ):
                loop.train(cut.loop, cut.eval, cut.sampling, parts)
        finally:
            loop.reach = reach
        assert [path.name for path in parts.checkpoints.complete()] == ["step-000003"]
    assert play(cut, Served(), tiny_model) is not None
    assert everything(cut.folder) == everything(whole.folder)


def test_where_no_worker_serves_the_old_weights_any_more_the_step_is_sampled_in_its_turn(
    make, tiny_model, capsys
):
    class Loses(Served):
        def generate(self, requests: Any, *, step: int) -> Iterator[Rollout]:
            if (
                step == 2
                and threading.current_thread() is threading.main_thread()
                and not self.lost
            ):
                self.lost = True
                raise VersionGone("no rollout worker is left")
            return super().generate(requests, step=step)

        lost = False

    recipe = make("gone")
    pool = Loses()
    state = play(recipe, pool, tiny_model)
    assert state is not None
    assert state.step == STEPS
    assert pool.versions[2] == 2
    assert "step 3: no rollout worker is left; it is sampled in its turn" in capsys.readouterr().out


def test_an_update_that_fails_ends_the_sampling_beside_it(make, tiny_model, monkeypatch):
    recipe, seen = make("fails"), []

    class Slow(Served):
        def generate(self, requests: Any, *, step: int) -> Iterator[Rollout]:
            for rollout in super().generate(requests, step=step):
                seen.append(step)
                if step == 1:
                    failed.wait(60)
                yield rollout

    failed = threading.Event()
    with parts_of(recipe, Slow(), tiny_model) as parts:

        def lose(*args: Any, **kwargs: Any) -> Any:
            failed.set()
            raise LearnerLost("rank 0 died")

        monkeypatch.setattr(parts.learners, "update", lose)
        with pytest.raises(LearnerError, match="lives in this process"):
            loop.train(recipe.loop, recipe.eval, recipe.sampling, parts)
    assert seen.count(1) < seen.count(0), "not all of the step ahead was sampled"


@pytest.mark.parametrize(
    ("algorithm", "changes", "message"),
    [
        ("grpo", {"sampler_ratio_cap": None}, "set algorithm.sampler_ratio_cap"),
        ("topr", {}, "topr has no correction for rollouts of older weights"),
        ("sasr", {}, "plans a step by what became of the one before"),
    ],
)
def test_who_cannot_train_on_older_rollouts_is_told(make, algorithm, changes, message):
    with pytest.raises(ConfigError, match=f"loop.staleness = 1: .*{message}"):
        make("refused", algorithm, **changes)


def test_every_method_says_whether_it_plans_ahead():
    """Those that do not: supervised ones, those whose plan reads what updates left, and `stages`."""
    names = set()
    for name, kind in ALGORITHMS.items():
        section = CONFIGS.get(name, {})
        config = kind.Config.model_validate(kind.Config.with_limit({"type": name, **section}, 8))
        if not kind(config, Setup(Sampling(8))).plans_ahead:
            names.add(name)

    class Own(Chord):
        def plan(self, prompts, experts, step):
            return super().plan(prompts, experts, step)

    assert not Own(ChordConfig(), Setup(Sampling(8))).plans_ahead, "it may have overridden anything"
    assert names == {"amft", "one_token_rollout", "sasr", "sft", "stages"}
