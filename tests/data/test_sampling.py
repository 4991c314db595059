"""Which prompts come next: by success rate, from easy to hard, and without the retired ones; and that runs resume."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from plait.engine.errors import ConfigError, DataError
from plait.engine.types import Prompt, Rollout, RolloutGroup, Score
from plait.rollouts.attempts import Attempts
from plait.rollouts.config import (
    CurriculumSampling,
    DifficultySampling,
    FilterConfig,
    JsonlData,
)
from plait.rollouts.data import Data, load_data
from plait.rollouts.draws import CurriculumStream, WeightedStream

UNKNOWN = Score.unknown("slow")
RIGHT, WRONG = Score.ok(1.0), Score.ok(0.0)


def load(
    folder: Path, tokenizer: Any, num: int = 24, total_prompts: int = 100, **config: Any
) -> Data:
    path = folder / f"{num}.jsonl"
    rows = [
        {"id": str(i), "prompt": f"{i}?", "difficulty": (7 * i) % num, "demonstration": "4"}
        for i in range(num)
    ]
    if not path.exists():  # a file in use must not change
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_data(
        JsonlData(type="jsonl", path=str(path), **config),
        tokenizer,
        num_eval=0,
        max_prompt_length=120,
        max_response_length=32,
        total_prompts=total_prompts,
    )


def group(prompt: Prompt, scores: Sequence[Score], prefix: int = 0) -> RolloutGroup:
    rollouts = tuple(
        Rollout(prompt.prompt_id, i, (1,) * (prefix + 1), prefix, (-1.0,), 0, "stop", "x")
        for i in range(len(scores))
    )
    return RolloutGroup(prompt, rollouts, tuple(scores))


def step(data: Data, n: int, judge: Callable[[int], Sequence[Score]]) -> list[int]:
    """One step of the loop; returns the numbers of its prompts."""
    prompts = data.take(n)
    data.observe([group(p, judge(int(p.prompt_id))) for p in prompts])
    return [int(p.prompt_id) for p in prompts]


def by_number(number: int) -> list[Score]:
    """A third is always solved, a third never, the others half the time."""
    return {0: [RIGHT, RIGHT], 1: [WRONG, WRONG], 2: [RIGHT, WRONG]}[number % 3]


FILTER = {"solved_after": 1, "hopeless_after": 2}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "filtered": {"filter": FILTER | {"retry_every": 2}},
    "difficulty": {"sampling": {"type": "difficulty"}},
    "both": {"sampling": {"type": "difficulty"}, "filter": FILTER},
    "curriculum": {"sampling": {"type": "curriculum", "window": 0.3}, "filter": FILTER},
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_resumed_run_draws_what_the_other_one_draws(
    tmp_path: Path, tokenizer: Any, name: str
) -> None:
    data = load(tmp_path, tokenizer, **SAMPLINGS[name])
    for _ in range(9):
        step(data, 5, by_number)
    state = json.loads(json.dumps(data.state_dict()))
    resumed = load(tmp_path, tokenizer, **SAMPLINGS[name])
    resumed.load_state_dict(state)
    for _ in range(15):
        assert step(data, 5, by_number) == step(resumed, 5, by_number)
        assert data.metrics() == resumed.metrics()
    assert data.state_dict() == resumed.state_dict()


@pytest.mark.parametrize("name", SAMPLINGS)
def test_prompts_of_a_take_differ(tmp_path: Path, tokenizer: Any, name: str) -> None:
    data = load(tmp_path, tokenizer, **SAMPLINGS[name])
    for n in (1, 5, 24, 7, 24, 2, 23):
        assert len(set(step(data, n, by_number))) == n
    with pytest.raises(DataError, match="a step asks for 25 different prompts"):
        data.take(25)


def test_the_seed_decides(tmp_path: Path, tokenizer: Any) -> None:
    for config in SAMPLINGS.values():
        first, same, other = (load(tmp_path, tokenizer, seed=s, **config) for s in (0, 0, 1))
        drawn = [step(first, 5, by_number) for _ in range(6)]
        assert [step(same, 5, by_number) for _ in range(6)] == drawn
        assert [step(other, 5, by_number) for _ in range(6)] != drawn


def test_half_solved_prompts_are_drawn_most(tmp_path: Path, tokenizer: Any) -> None:
    data = load(tmp_path, tokenizer, sampling={"type": "difficulty", "min_weight": 0.05})
    for _ in range(20):
        step(data, 4, by_number)
    counts = Counter(number % 3 for _ in range(150) for number in step(data, 4, by_number))
    assert counts[2] > 5 * counts[0] > 0, "what is solved or hopeless is still looked at"
    assert counts[2] > 5 * counts[1] > 0
    assert data.metrics()["data/success_rate"] == pytest.approx(0.5)
    assert data.metrics()["data/visited"] == 24


def test_first_draws_follow_the_weights() -> None:
    """Row 0 at the target, row 1 half way, row 2 never seen, row 3 far away."""
    rates = np.array([0.5, 0.25, np.nan, 1.0])
    config = DifficultySampling(type="difficulty", min_weight=0.1)
    stream = WeightedStream(config, lambda: rates, seed=0, name="x")
    assert stream.weights().tolist() == [1, 0.5, 1, 0.1]
    first = Counter(stream.take(1)[0] for _ in range(4000))
    for row, weight in enumerate((1, 0.5, 1, 0.1)):
        assert first[row] / 4000 == pytest.approx(weight / 2.6, abs=0.03)


def test_the_target_may_lie_elsewhere() -> None:
    config = DifficultySampling(type="difficulty", target_rate=0.25)
    stream = WeightedStream(config, lambda: np.array([0, 0.25, 1.0]), seed=0, name="x")
    assert stream.weights() == pytest.approx([2 / 3, 1, 0.05])


def test_running_rates() -> None:
    attempts = Attempts(3, memory=0.5, config=None)
    attempts.observe(0, [True, False], 0, epoch=0)
    attempts.observe(0, [True, True], 0, epoch=0)
    attempts.observe(1, [], 4, epoch=0)
    attempts.observe(2, [False], 3, epoch=0)
    assert attempts.rates.tolist()[::2] == [0.75, 0.0]
    assert np.isnan(attempts.rates[1]), "four UNKNOWN scores say nothing"


def test_a_curriculum_goes_from_easy_to_hard() -> None:
    difficulty = np.arange(1000)[::-1].astype(float)
    config = CurriculumSampling(type="curriculum", start=0.1, window=0.1)
    stream = CurriculumStream(config, difficulty, 2000, seed=0, name="x")
    means = []
    for _ in range(100):
        rows = stream.take(20)
        assert len(set(rows)) == 20
        means.append(difficulty[rows].mean())
    assert means[0] < 100
    assert means[-1] > 900
    assert np.corrcoef(means, range(100))[0, 1] > 0.99
    assert difficulty[stream.take(100)].min() >= 900, "beyond its end it stays with the hardest"


def test_a_curriculum_without_a_window_keeps_the_easy_ones() -> None:
    difficulty = np.arange(1000).astype(float)
    config = CurriculumSampling(type="curriculum", start=0.1)
    stream = CurriculumStream(config, difficulty, 1000, seed=0, name="x")
    assert max(stream.take(50)) < 100
    stream.position = 1000
    assert len(set(stream.take(1000))) == 1000


def test_a_narrow_curriculum_widens_to_what_a_step_needs() -> None:
    config = CurriculumSampling(type="curriculum", start=0.01, window=0.01)
    stream = CurriculumStream(config, np.arange(100.0), 1000, seed=0, name="x")
    assert sorted(stream.take(10)) == list(range(10))
    stream.position = 1000
    assert sorted(stream.take(10)) == list(range(90, 100))


def test_a_curriculum_needs_the_column(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "level": 1}, {"prompt": "b", "level": "hard"}, {"prompt": "c"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = JsonlData(
        type="jsonl",
        path=str(path),
        columns={"difficulty": "level"},  # type: ignore[arg-type]
        sampling={"type": "curriculum"},  # type: ignore[arg-type]
    )
    with pytest.raises(ConfigError) as caught:
        load_data(config, tokenizer, num_eval=0, max_prompt_length=64, max_response_length=32)
    assert "2 of 3 training rows lack" in str(caught.value)
    assert "'rows.jsonl/2', 'rows.jsonl/3'" in str(caught.value)


def test_solved_and_hopeless_prompts_retire(tmp_path: Path, tokenizer: Any) -> None:
    data = load(tmp_path, tokenizer, filter=FILTER)
    for _ in range(12):  # two epochs
        step(data, 4, by_number)
    found = data.metrics()
    assert (found["data/solved"], found["data/hopeless"], found["data/active"]) == (8, 8, 8)
    assert found["data/rejoined"] == 0
    assert {n % 3 for _ in range(12) for n in step(data, 4, by_number)} == {2}


def test_hopeless_prompts_are_tried_again() -> None:
    config = FilterConfig(hopeless_after=2, retry_every=3)
    attempts, rows = Attempts(2, 0.0, config), np.arange(2)

    def active(epoch: int) -> list[bool]:
        found = attempts.active(rows, epoch)
        assert found is not None
        return found.tolist()

    attempts.observe(0, [False], 0, epoch=0)
    assert active(1) == [True, True]
    attempts.observe(0, [False], 0, epoch=1)
    assert [active(epoch)[0] for epoch in (1, 2, 3, 4)] == [False, False, False, True]
    attempts.observe(0, [False], 0, epoch=4)
    assert [active(epoch)[0] for epoch in (4, 6, 7)] == [False, False, True]
    attempts.observe(0, [True], 0, epoch=7)
    assert active(7) == [True, True]


def test_too_few_active_prompts_let_the_retired_rejoin(tmp_path: Path, tokenizer: Any) -> None:
    data = load(tmp_path, tokenizer, filter={"solved_after": 1})
    for _ in range(6):
        step(data, 4, lambda number: [RIGHT, RIGHT])
    assert data.metrics()["data/active"] == 0
    step(data, 4, lambda number: [WRONG, RIGHT])
    found = data.metrics()
    assert (found["data/rejoined"], found["data/active"]) == (24, 24)


def test_what_counts_as_a_prompt_s_own_attempt(tmp_path: Path, tokenizer: Any) -> None:
    """Neither forced prefixes nor hints nor UNKNOWN scores, and only the first group of a step."""
    data = load(tmp_path, tokenizer, num=6, filter={"hopeless_after": 1})
    a, b, c, d, e, f = data.take(6)
    hinted = data.show_hint(b, b.demonstrations[0].token_ids[:-1])
    assert hinted is not None
    data.observe(
        [
            group(a, [WRONG, WRONG], prefix=3),
            group(hinted, [WRONG, WRONG]),
            group(c, [UNKNOWN, UNKNOWN]),
            group(d, [WRONG, UNKNOWN]),
            group(e, [WRONG, WRONG]),
            group(f, [RIGHT, RIGHT]),
            group(f, [WRONG, WRONG]),
        ]
    )
    found = data.metrics()
    assert (found["data/hopeless"], found["data/visited"]) == (1, 3)
    assert e.prompt_id not in {p.prompt_id for p in data.take(5)}


def test_prefixed_rollouts_of_a_mixed_group_are_left_aside(tmp_path: Path, tokenizer: Any) -> None:
    data = load(tmp_path, tokenizer, num=2, filter={"solved_after": 1})
    prompt, _ = data.take(2)
    plain, forced = group(prompt, [WRONG]), group(prompt, [RIGHT], prefix=2)
    data.observe([RolloutGroup(prompt, plain.rollouts + forced.rollouts, (WRONG, RIGHT))])
    assert data.metrics()["data/success_rate"] == 0


def test_without_sampling_or_filter_nothing_is_kept(tmp_path: Path, tokenizer: Any) -> None:
    data = load(tmp_path, tokenizer)
    step(data, 4, by_number)
    assert (data.metrics(), data.state_dict()["attempts"]) == ({}, None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "filters nothing; set solved_after or hopeless_after"),
        ({"solved_after": 1, "retry_every": 2}, "set hopeless_after too"),
        ({"solved_after": 0}, "greater than or equal to 1"),
    ],
)
def test_a_filter_that_cannot_be_meant(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FilterConfig(**config)


@pytest.mark.parametrize("broken", [None, {}, {"rows": [1]}])
def test_a_state_without_attempts_is_none(tmp_path: Path, tokenizer: Any, broken: Any) -> None:
    data = load(tmp_path, tokenizer, filter=FILTER)
    with pytest.raises(DataError, match="not a state of observed prompts"):
        data.load_state_dict(data.state_dict() | {"attempts": broken})
