"""Mixtures: weights hold over every stretch, parts are named and rewarded, nothing held out is trained."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from plait.engine.errors import ConfigError, DataError
from plait.engine.metrics import rollout_metrics
from plait.engine.types import Rollout, RolloutGroup, Score
from plait.rollouts.config import DataConfig, MixtureData
from plait.rollouts.data import Data, load_data
from plait.rollouts.mixture import apportion
from plait.rollouts.readers import read_records

CHECKED: TypeAdapter[Any] = TypeAdapter(DataConfig)


def part(
    folder: Path, name: str, rows: list[dict[str, Any]], weight: float = 1, **more: Any
) -> Any:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"weight": weight, "data": {"type": "jsonl", "path": str(path)}, **more}


def rows(n: int, word: str, demonstrated: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{word} {i}"} | ({"demonstration": "4"} if i < demonstrated else {})
        for i in range(n)
    ]


def mixture(*parts: Any, **more: Any) -> MixtureData:
    return CHECKED.validate_python({"type": "mixture", "parts": list(parts), **more})


def load(config: Any, tokenizer: Any, num_eval: int = 0) -> Data:
    return load_data(
        config, tokenizer, num_eval=num_eval, max_prompt_length=1000, max_response_length=32
    )


def gym(dataset: str, **config: Any) -> dict[str, Any]:
    return {"type": "reasoning_gym", "dataset": dataset, "size": 60, **config}


def test_weights_hold_over_every_stretch(tmp_path: Path, tokenizer: Any) -> None:
    config = mixture(
        part(tmp_path, "a", rows(90, "a"), 7),
        part(tmp_path, "b", rows(90, "b"), 2),
        part(tmp_path, "c", rows(90, "c"), 1),
    )
    data = load(config, tokenizer)
    drawn = [p for _ in range(60) for p in data.take(10)]
    names = [prompt.part for prompt in drawn]
    for start in range(0, len(names) - 50, 7):
        counts = Counter(names[start : start + 50])
        assert abs(counts["a"] - 35) <= 2
        assert abs(counts["b"] - 10) <= 2
        assert abs(counts["c"] - 5) <= 2
    assert Counter(names) == {"a": 420, "b": 120, "c": 60}


def test_each_part_goes_through_its_epochs(tmp_path: Path, tokenizer: Any) -> None:
    config = mixture(part(tmp_path, "a", rows(21, "a"), 3), part(tmp_path, "b", rows(30, "b"), 1))
    data = load(config, tokenizer)
    drawn = [p for _ in range(20) for p in data.take(4)]
    a = [p.prompt_id for p in drawn if p.part == "a"]
    b = [p.prompt_id for p in drawn if p.part == "b"]
    assert len(set(a[:21])) == len(set(a[21:42])) == 21
    assert a[:21] != a[21:42]
    assert len(set(b)) == len(b) == 20


def test_ids_rewards_and_counts_by_part(tmp_path: Path, tokenizer: Any) -> None:
    own = {"prompt": "own", "reward": "numeric", "id": "x"}
    config = mixture(
        part(tmp_path, "sums", [own, *rows(9, "a")], 1, reward="exact"),
        {"weight": 2, "data": gym("chain_sum"), "reward": "reasoning_gym"},
        {"weight": 1, "data": gym("leg_counting"), "name": "legs"},
    )
    records = read_records(config)
    assert records.rewards == {"numeric", "exact", "reasoning_gym"}
    data = load(config, tokenizer)
    assert data.report.parts == {"sums": 10, "chain_sum": 60, "legs": 60}
    assert "to train on by part: sums 10, chain_sum 60, legs 60" in str(data.report)
    assert data.find("sums/x").reward == "numeric"
    assert data.find("sums/sums.jsonl/2").reward == "exact"
    assert data.find("chain_sum/chain_sum/7").reward == "reasoning_gym"
    assert data.find("legs/leg_counting/7").reward is None
    ids = [row.prompt.prompt_id for row in data.rows()]
    assert len(set(ids)) == 130


def test_held_out_prompts_are_shared_out_and_never_trained(tmp_path: Path, tokenizer: Any) -> None:
    """The two parts hold the same problems."""
    config = mixture(
        part(tmp_path, "a", rows(40, "same"), 3), part(tmp_path, "b", rows(40, "same"), 1)
    )
    data = load(config, tokenizer, num_eval=8)
    assert Counter(p.part for p in data.eval_prompts) == {"a": 6, "b": 2}
    held = {p.messages[-1]["content"] for p in data.eval_prompts}
    trained = {row.prompt.messages[-1]["content"] for row in data.rows()}
    assert not held & trained
    report = data.report
    assert report.rows == 80 == report.kept + report.held_out + sum(report.dropped.values())


def test_two_parts_of_one_generator_differ(tokenizer: Any) -> None:
    config = mixture(
        {"weight": 1, "name": "one", "data": gym("chain_sum")},
        {"weight": 1, "name": "two", "data": gym("chain_sum")},
    )
    texts = [r.messages[-1]["content"] for r in read_records(config).train]
    assert len(set(texts)) > 110


def test_experts_come_from_the_parts_that_have_them(tmp_path: Path, tokenizer: Any) -> None:
    config = mixture(
        part(tmp_path, "none", rows(20, "a"), 5),
        part(tmp_path, "some", rows(20, "b", demonstrated=15), 2),
        part(tmp_path, "all", rows(20, "c", demonstrated=20), 1),
    )
    data = load(config, tokenizer)
    drawn = [p for _ in range(10) for p in data.take_experts(6)]
    assert all(p.demonstrations for p in drawn)
    assert Counter(p.part for p in drawn) == {"some": 40, "all": 20}
    assert data.num_experts == 35


def test_resume(tmp_path: Path, tokenizer: Any) -> None:
    parts = [
        part(tmp_path, "a", rows(50, "a", 50), 0.7),
        part(tmp_path, "b", rows(30, "b", 9), 0.3),
    ]
    config = mixture(*parts)
    data = load(config, tokenizer)
    for _ in range(7):
        data.take(9)
        data.take_experts(3)
    state = json.loads(json.dumps(data.state_dict()))
    resumed = load(config, tokenizer)
    resumed.load_state_dict(state)
    for _ in range(9):
        assert data.take(9) == resumed.take(9)
        assert data.take_experts(3) == resumed.take_experts(3)
    parts[0]["weight"] = 0.6
    with pytest.raises(DataError, match="drawing"):
        load(mixture(*parts), tokenizer).load_state_dict(state)


def test_a_part_that_is_too_small_for_a_step(tmp_path: Path, tokenizer: Any) -> None:
    config = mixture(part(tmp_path, "a", rows(5, "a"), 9), part(tmp_path, "b", rows(50, "b"), 1))
    with pytest.raises(
        DataError, match=r"part 'a' of the mixture has 5: .*lower the part's weight"
    ):
        load(config, tokenizer).take(20)


def test_errors_name_the_part(tmp_path: Path) -> None:
    good = part(tmp_path, "a", rows(5, "a"))
    with pytest.raises(ConfigError, match=r"data\.parts\.1\.data\.dataset = 'chain_sums'"):
        read_records(mixture(good, {"weight": 1, "data": gym("chain_sums")}))
    with pytest.raises(ValidationError, match=r"names stand for several parts \(a\)"):
        mixture(good, good)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        mixture({"weight": 1, "data": gym("chain_sum", seed=3)})
    with pytest.raises(ValidationError, match="greater than 0"):
        mixture({**good, "weight": 0})
    with pytest.raises(ValidationError, match="at least 1 item"):
        mixture()


@pytest.mark.parametrize("kind", ["parquet", "csv", "json"])
def test_a_file_s_suffix_is_no_type(kind: str) -> None:
    with pytest.raises(ValidationError, match=f"`type: huggingface` with `path: ROWS.{kind}`"):
        CHECKED.validate_python({"type": kind, "path": f"x.{kind}"})


def test_apportioned_numbers_add_up() -> None:
    assert apportion(10, [0.7, 0.2, 0.1]) == [7, 2, 1]
    assert apportion(3, [1, 1]) == [2, 1]
    assert apportion(0, [1, 1]) == [0, 0]
    assert sum(apportion(101, [0.333, 0.333, 0.334])) == 101


def test_metrics_by_part(tmp_path: Path, tokenizer: Any) -> None:
    config = mixture(part(tmp_path, "a", rows(5, "a")), part(tmp_path, "b", rows(5, "b")))
    groups = []
    for prompt in load(config, tokenizer).take(4):
        rollout = Rollout(prompt.prompt_id, 0, (1,), 0, (-1.0,), 0, "stop", "x")
        score = Score.ok(prompt.part == "a") if prompt.part == "a" else Score.unknown("slow")
        groups.append(RolloutGroup(prompt, (rollout,), (score,)))
    found = rollout_metrics(groups)
    assert (found["mixture/prompts/a"], found["mixture/prompts/b"]) == (2, 2)
    assert found["mixture/reward/a"] == 1
    assert "mixture/reward/b" not in found, "unknown is not 0"
