"""The loop with a real data source and real checkpoints: prompts chosen by their rollouts, resumed in the middle."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from plait.algorithms import ALGORITHMS, Setup
from plait.engine import loop
from plait.engine.checkpoint import Checkpoints
from plait.engine.config import CheckpointConfig, EvalConfig, LoopConfig
from plait.engine.types import Rollout, Sampling, Score
from plait.rewards.groups import ExpectedGroups
from plait.rollouts.config import JsonlData, MixtureData
from plait.rollouts.data import load_data
from tiny_model import make_tiny_tokenizer

SAMPLING = Sampling(max_tokens=6)
PROMPTS = 4


class Samplers:
    """Rollouts and scores that depend on prompt, index and step alone; every seventh score is UNKNOWN."""

    def generate(self, requests, *, step):
        for request in requests:
            for index in range(request.n):
                name = request.prompt.prompt_id
                yield Rollout(name, index, (step + 3,), 0, (-1.0,), 0, "stop", "")

    def score(self, requests, rollouts, earlier=()):
        groups, scores = ExpectedGroups(requests), {}
        for rollout in rollouts:
            groups.admit(rollout)
            number = int(rollout.prompt_id.rpartition("/")[2])
            luck = number + rollout.index * rollout.token_ids[0]
            known = Score.ok(float([1, 0, luck % 2][number % 3]))
            scores[rollout.prompt_id, rollout.index] = known if luck % 7 else Score.unknown("slow")
        return groups.grouped(scores)

    def receivers(self):
        return ()


class Learners:
    """Trains nothing."""

    def connect(self, receivers): ...

    def annotate(self, batch, needs, *, single, loss):
        return batch

    def update(self, batch, update, **hooks):
        return ()

    def save(self, folder):
        Path(folder).mkdir()

    def saved(self, *, wait):
        return []

    def load(self, paths): ...


class Log:
    folder = Path()

    def __init__(self):
        self.steps: list[Any] = []

    def begin(self, state, steps): ...

    def took(self, name, seconds): ...

    def phase(self, name):
        return nullcontext()

    def watch(self, stream, requests):
        return stream

    def record(self, record): ...

    def step(self, state, groups, metrics):
        names = [group.prompt.prompt_id for group in groups]
        self.steps.append((names, {k: v for k, v in metrics.items() if k.startswith("data/")}))


@pytest.fixture(scope="module")
def parts_of_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("rows")
    parts = []
    for name, count in (("a", 20), ("b", 12)):
        rows = [{"id": str(i), "prompt": f"{name} {i}?", "difficulty": i} for i in range(count)]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        parts.append({"weight": count, "data": {"type": "jsonl", "path": str(path)}})
    return make_tiny_tokenizer(folder), parts


def play(data: Any, steps: int, folder: Path) -> list[Any]:
    """Steps of the loop from the last checkpoint in `folder`."""
    grpo = ALGORITHMS["grpo"]
    config = grpo.Config.model_validate(
        {"type": "grpo", "rollouts_per_prompt": 3, "max_response_length": 6}
    )
    samplers, log, nothing = Samplers(), Log(), cast(Any, None)
    parts = loop.Parts(
        algorithm=grpo(config, Setup(SAMPLING)),
        data=data,
        rollouts=cast(Any, samplers),
        scorer=cast(Any, samplers),
        learners=cast(Any, Learners()),
        checkpoints=Checkpoints(folder, CheckpointConfig(every=1)),
        log=cast(Any, log),
        probes=(),
        tolerance=nothing,
    )
    loop.train(
        LoopConfig(steps=steps, prompts_per_step=PROMPTS),
        EvalConfig(num_prompts=0),
        SAMPLING,
        parts,
    )
    return log.steps


FILTER = {"solved_after": 1, "hopeless_after": 2, "retry_every": 2}


@pytest.mark.parametrize(
    "drawing",
    [
        {"sampling": "difficulty"},
        {"filter": FILTER},
        {"sampling": "difficulty", "filter": FILTER},
        {"sampling": {"type": "curriculum", "window": 0.5}, "filter": FILTER},
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_run_that_was_interrupted_goes_on_as_it_would_have(
    parts_of_data: Any, drawing: Any, mixed: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(loop, "publish", lambda parts, state: None)
    tokenizer, parts = parts_of_data

    def load() -> Any:
        config = (
            MixtureData(type="mixture", parts=parts, **drawing)
            if mixed
            else JsonlData(**parts[0]["data"], **drawing)
        )
        limits: Any = {"num_eval": 0, "max_prompt_length": 99, "max_response_length": 6}
        return load_data(config, tokenizer, total_prompts=20 * PROMPTS, **limits)

    whole = play(load(), 20, tmp_path / "whole")
    first = play(load(), 9, tmp_path / "cut")
    second = play(load(), 20, tmp_path / "cut")
    assert [len(first), len(second)] == [9, 11]
    assert first + second == whole
    visited = [metrics["data/visited"] for _, metrics in whole]
    assert visited == sorted(visited)
    assert all(len(set(names)) == PROMPTS for names, _ in whole)
    if "filter" in drawing:
        assert max(metrics["data/solved"] for _, metrics in whole) > 0


def test_the_state_of_a_run_is_small_and_readable(
    parts_of_data: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(loop, "publish", lambda parts, state: SimpleNamespace())
    tokenizer, parts = parts_of_data
    config = MixtureData(type="mixture", parts=parts, filter=FILTER)  # type: ignore[arg-type]
    data = load_data(config, tokenizer, num_eval=0, max_prompt_length=99, max_response_length=6)
    play(data, 3, tmp_path)
    state = json.loads((tmp_path / "step-000003" / "state.json").read_text())["data"]
    assert sum(state["prompts"]["drawn"]) == 3 * PROMPTS
    assert state["attempts"]["rows"] == sorted(state["attempts"]["rows"])
    assert len(state["attempts"]["rates"]) <= 3 * PROMPTS
