"""Evaluation sets: all of their rows are asked, none of their problems is trained."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from plait.engine.errors import ConfigError, DataError
from plait.rollouts.config import JsonlData, MixtureData
from plait.rollouts.data import load_data
from plait.rollouts.readers import read_records


def write(path: Path, numbers: range, **columns: Any) -> str:
    rows = [{"id": str(i), "prompt": f"{i}?", "answer": str(i), **columns} for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def jsonl(path: str) -> dict[str, Any]:
    return {"type": "jsonl", "path": path}


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, Any]:
    return {
        "aime": {"data": jsonl(write(tmp_path / "a.jsonl", range(90, 100))), "reward": "exact"},
        "own": {"data": jsonl(write(tmp_path / "b.jsonl", range(200, 205), reward="math"))},
    }


def test_sets_are_asked_whole_and_never_trained(tmp_path: Path, sets, tokenizer) -> None:
    config = JsonlData(**jsonl(write(tmp_path / "t.jsonl", range(100))), eval_sets=sets)
    records = read_records(config, num_eval=6)
    assert Counter(r.part for r in records.held_out) == {"": 6, "aime": 10, "own": 5}
    assert {r.reward for r in records.held_out if r.part == "aime"} == {"exact"}
    assert {r.reward for r in records.held_out if r.part == "own"} == {"math"}
    assert {"exact", "math"} <= records.rewards
    trained = {r.messages[-1]["content"] for r in records.train}
    asked = {r.messages[-1]["content"] for r in records.held_out}
    assert not trained & asked
    assert len(records.train) + len(records.copies) + 6 == 100
    data = load_data(config, tokenizer, num_eval=6, max_prompt_length=100, max_response_length=10)
    assert len(data.eval_prompts) == 21
    assert data.num_prompts == len(records.train)
    assert len({p.prompt_id for p in data.eval_prompts}) == 21


def test_parts_of_a_mixture_keep_their_rows_apart(tmp_path: Path, sets, tokenizer) -> None:
    parts = [
        {"weight": 1, "name": "x", "data": jsonl(write(tmp_path / "x.jsonl", range(80, 95)))},
        {"weight": 1, "name": "y", "data": jsonl(write(tmp_path / "y.jsonl", range(10)))},
    ]
    config = MixtureData(type="mixture", parts=parts, eval_sets=sets)  # type: ignore[arg-type]
    records = read_records(config)
    assert {part.name: part.num_train for part in records.parts} == {"x": 10, "y": 10}
    data = load_data(config, tokenizer, num_eval=0, max_prompt_length=100, max_response_length=10)
    assert data.report.parts == {"x": 10, "y": 10}
    clash = config.model_copy(update={"eval_sets": {"x": config.eval_sets["aime"]}})
    with pytest.raises(ConfigError, match=r"data.eval_sets.x: a part of the mixture has this name"):
        read_records(clash)


def test_what_is_wrong_with_a_set_is_named_with_its_place(tmp_path: Path, sets) -> None:
    rows = jsonl(write(tmp_path / "t.jsonl", range(90, 95)))
    with pytest.raises(DataError, match=r"all training problems equal problems of data\.eval_sets"):
        read_records(JsonlData(**rows, eval_sets=sets))
    missing = {"gone": {"data": jsonl(str(tmp_path / "gone.jsonl"))}}
    with pytest.raises(ConfigError, match=r"data.eval_sets.gone.data.path = .*no such file"):
        read_records(JsonlData(**rows, eval_sets=missing))  # type: ignore[arg-type]
    for name in ("held_out", "a b"):
        with pytest.raises(ValidationError, match="is no name for a set"):
            JsonlData(**rows, eval_sets={name: sets["own"]})
