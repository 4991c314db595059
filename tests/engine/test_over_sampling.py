"""Runs that sample more prompts than a step trains: every prompt is trained once, and no token is drawn twice."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from in_process_run import Dice, believe, parts_of, play, prompts_of, sections, strike

from end_to_end.command_line import no_verifier, read_lines, tiny_recipe, write_parity, write_recipe
from end_to_end.test_every_algorithm import CONFIGS
from plait.algorithms import ALGORITHMS
from plait.engine import loop
from plait.engine.errors import ConfigError, RewardError, Stopped
from plait.engine.over_sampling import FirstComplete
from plait.engine.types import Prompt, Rollout, RolloutRequest, Sampling
from plait.launch.config import load_recipe
from plait.rewards.groups import ExpectedGroups

STEPS, PER_STEP, EXTRA, LENGTH = 7, 4, 3, 6


class Uneven(Dice):
    """Some samples take long; what they are depends on prompt, index and prefix alone, however often interrupted."""

    def __init__(self) -> None:
        self.fresh: Counter[tuple[str, int]] = Counter()
        self.went_on = 0
        self._open: dict[tuple[str, int], tuple[RolloutRequest, int]] = {}

    def generate(self, requests: Any, *, step: int) -> Iterator[Rollout]:
        self._open = {}
        for request in requests:
            known = {one.index: one for one in request.begun}
            for index in range(request.first_index, request.first_index + request.n):
                one = known.get(index)
                if one is not None and one.finish_reason != "abort":
                    yield one
                    continue
                key = request.prompt.prompt_id, index
                self.fresh[key] += one is None
                self.went_on += one is not None
                self._open[key] = request, 0 if one is None else len(one.logprobs)
        for key in sorted(self._open, key=lambda key: (self.slow(*key), key)):
            request, _ = self._open.pop(key)
            yield self.sample(request, key[1], LENGTH)
        self._open = {}

    def interrupt(self) -> list[Rollout]:
        """A sample of no token was not begun."""
        came = [(key, *found) for key, found in self._open.items()]
        self._open = {}
        lengths = [(r, key[1], max(had, self.slow(*key) % LENGTH)) for key, r, had in came]
        self.fresh.subtract((r.prompt.prompt_id, index) for r, index, n in lengths if not n)
        return [self.sample(r, index, length) for r, index, length in lengths if length]

    def begun(self, names: list[str]) -> set[int]:
        """How often samples of these prompts were begun."""
        return {n for (name, _), n in self.fresh.items() if name in names}

    def slow(self, name: str, index: int) -> int:
        return zlib.crc32(f"{name} {index}".encode()) % 97

    def sample(self, request: RolloutRequest, index: int, length: int) -> Rollout:
        name, prefix = request.prompt.prompt_id, request.prefix
        own = [3 + zlib.crc32(f"{name} {index} {i}".encode()) % 290 for i in range(LENGTH)][:length]
        end = "stop" if length == LENGTH else "abort"
        ids, text = (*prefix, *own), " ".join(map(str, own))
        return Rollout(name, index, ids, len(prefix), (-5.7,) * length, self.version, end, text)


@pytest.fixture
def make(tiny_model, tmp_path, monkeypatch):
    """Recipes of runs in the test's folder."""
    rows = [
        {
            "prompt": f"{i} + 1 =",
            "answer": str(i + 1),
            "demonstration": f"Add 1 to {i}. So {i + 1}.",
        }
        for i in range(80)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_parity(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "sync", believe)

    def build(name: str, algorithm: str = "grpo", loop: Any = None, **changes: Any) -> Any:
        recipe = tiny_recipe(
            tiny_model,
            run={"name": name} | changes.pop("run", {}),
            reward=no_verifier("parity:grade"),
            rollouts={"max_response_length": 24},
            loop={"steps": STEPS, "prompts_per_step": PER_STEP, "extra_prompts": EXTRA}
            | (loop or {}),
            eval={"num_prompts": 2, "every": 0},
            checkpoint={"every": 3, "keep": 2},
        )
        recipe["algorithm"] = section = sections(algorithm, CONFIGS) | changes
        if algorithm == "grpo":
            section["refill_rounds"] = changes.get("refill_rounds", 0)
        if "sampler_ratio_cap" in ALGORITHMS[algorithm].Config.model_fields:
            section.setdefault("sampler_ratio_cap", 2.0)
        return load_recipe(tmp_path / write_recipe(tmp_path, f"{name}.yaml", recipe))

    return build


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_lines(folder / "metrics.jsonl") if "time/step" in row]


@pytest.mark.parametrize("algorithm", ["grpo", "chord"])
def test_every_prompt_is_trained_once_and_every_sample_begun_once(make, tiny_model, algorithm):
    recipe, pool = make("whole", algorithm), Uneven()
    assert play(recipe, pool, tiny_model) is not None
    names = prompts_of(recipe.folder)
    assert len(names) == len(set(names)) == STEPS * PER_STEP
    rows = metrics_of(recipe.folder)
    assert [row["prompts/drawn"] for row in rows] == [PER_STEP] * STEPS
    assert [row["prompts/waiting"] for row in rows] == [*[EXTRA] * (STEPS - 1), 0]
    assert sum(row["rollouts/discarded_tokens"] for row in rows) == 0
    assert rows[-1]["rollouts/waiting_tokens"] == 0
    assert pool.begun(names) == {1}
    assert pool.went_on > 0
    assert max(row["staleness/max"] for row in rows) >= 1
    tokens = Counter[str]()
    for path in (recipe.folder / "rollouts").glob("step-*"):
        tokens.update(row["prompt_id"] for row in read_lines(path))
    assert tokens.keys() == set(names)
    assert len(set(tokens.values())) == 1, "all rollouts of each"


def test_the_prompts_are_those_that_a_plain_run_trains(make, tiny_model):
    over, plain = make("over"), make("plain", loop={"extra_prompts": 0})
    assert play(over, Uneven(), tiny_model) is not None
    assert play(plain, Uneven(), tiny_model) is not None
    found, expected = prompts_of(over.folder), prompts_of(plain.folder)
    assert found != expected
    assert sorted(found) == sorted(expected)


def test_a_refill_draws_no_prompt_that_waits(make, tiny_model):
    recipe = make("refilled", refill_rounds=2)
    assert play(recipe, Uneven(), tiny_model) is not None
    names = prompts_of(recipe.folder)
    assert len(names) == len(set(names)) > STEPS * PER_STEP


def test_interrupted_anywhere_no_prompt_is_lost_or_repeated(make, tiny_model):
    recipe = make("cut")
    again = partial(play, recipe, Uneven(), tiny_model)
    ended = [
        again(strike("step.journaled", 2)),
        again(strike("step.updated", 5)),
        again(strike("step.journaled", 1)),
        again(strike("step.updated", 1)),
    ]
    assert ended == [None] * 4
    assert again() is not None
    names = prompts_of(recipe.folder)
    assert len(names) == len(set(names)) == STEPS * PER_STEP


def test_a_checkpoint_holds_what_is_sampled_already(make, tiny_model):
    recipe, pool = make("asked"), Uneven()
    with parts_of(recipe, pool, tiny_model) as parts:

        def ask(place: str) -> None:
            if place == "step.updated" and parts.log.at.step == 2:
                parts.stop.ask("SIGTERM")

        reach, loop.reach = loop.reach, ask
        try:
            with pytest.raises(Stopped, match="SIGTERM after 2 steps"):
                loop.train(recipe.loop, recipe.eval, recipe.sampling, parts)
        finally:
            loop.reach = reach
    state = json.loads((recipe.folder / "checkpoints/step-000002/state.json").read_text())
    carried = state["run"]["carried"]
    assert len(carried["prompts"]) == EXTRA
    assert {one["finish_reason"] for one in carried["rollouts"]} == {"abort", "stop"}
    assert play(recipe, pool, tiny_model) is not None
    names = prompts_of(recipe.folder)
    assert pool.begun(names) == {1}, "nothing was begun again"
    assert len(set(names)) == STEPS * PER_STEP


def test_what_follows_another_prefix_by_now_is_drawn_again_and_counted(make, tiny_model):
    """`prefix_rft` draws new prefixes each step."""
    recipe, pool = make("prefixes", "prefix_rft", prefix_ratio_low_start=0.1), Uneven()
    assert play(recipe, pool, tiny_model) is not None
    rows = metrics_of(recipe.folder)
    assert sum(row["rollouts/discarded_tokens"] for row in rows) > 0
    names = prompts_of(recipe.folder)
    assert pool.begun(names) > {1}
    assert len(set(names)) == STEPS * PER_STEP


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loop": {"extra_prompts": 5}}, "is more than loop.prompts_per_step = 4"),
        ({"loop": {"staleness": 1}}, "set one of them to 0"),
        ({"run": {"deterministic": True}}, "loop.extra_prompts = 3: takes what is complete first"),
        ({"sampler_ratio_cap": None}, "loop.extra_prompts = 3: .*set algorithm.sampler_ratio_cap"),
        ({"algorithm": "sasr"}, "loop.extra_prompts = 3: sasr plans a step by what became"),
    ],
)
def test_who_cannot_use_it_is_told(make, changes, message):
    with pytest.raises(ConfigError, match=message):
        make("refused", **changes)


def rollout(name: str, index: int) -> Rollout:
    return Rollout(name, index, (5,), 0, (-1.0,), 0, "stop", "")


def test_complete_prompts_pass_together_and_the_others_are_left():
    requests = [RolloutRequest(Prompt(name, (), (3,)), 2, Sampling(4)) for name in "abc"]
    first = FirstComplete(requests, 2)
    order = [("a", 0), ("b", 1), ("c", 0), ("b", 0), ("a", 1), ("c", 1)]
    stream = (rollout(*key) for key in order)
    assert [(r.prompt_id, r.index) for r in first.of(stream)] == [
        ("b", 1),
        ("b", 0),
        ("a", 0),
        ("a", 1),
    ]
    assert [(r.prompt_id, r.index) for r in first.left] == [("c", 0)]
    assert [(r.prompt_id, r.index) for r in stream] == [("c", 1)], "no more was taken"


@pytest.mark.parametrize("missing", [("b", 0), None])
def test_a_pool_that_ends_too_early_is_an_error(missing):
    groups = ExpectedGroups(
        [RolloutRequest(Prompt(name, (), (3,)), 2, Sampling(4)) for name in "ab"]
    )
    for key in [("a", 0), ("a", 1), ("b", 1)] if missing else [("a", 0), ("a", 1)]:
        groups.admit(rollout(*key))
    with pytest.raises(RewardError, match="lacks rollouts" if missing else "after 1 of 2 prompts"):
        groups.check_complete(2)
