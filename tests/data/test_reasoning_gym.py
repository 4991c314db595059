"""Procedural problems of reasoning-gym."""

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest
import reasoning_gym

from plait.engine.errors import ConfigError, DataError
from plait.rollouts.config import ReasoningGymData
from plait.rollouts.data import load_data
from plait.rollouts.readers import read_records


def gym(dataset: str, **config: Any) -> ReasoningGymData:
    return ReasoningGymData(type="reasoning_gym", dataset=dataset, **config)


def test_chain_sum() -> None:
    records = read_records(gym("chain_sum", size=300, config={"min_terms": 2, "max_terms": 2}), 50)
    assert len(records.held_out) == 50
    assert len(records.train) + len(records.copies) == 300
    held_out = {record.messages[0]["content"] for record in records.held_out}
    assert not held_out & {record.messages[0]["content"] for record in records.train}
    record = records.train[0]
    assert record.prompt_id.startswith("chain_sum/")
    assert records.held_out[0].prompt_id.startswith("chain_sum/eval/")
    assert record.demonstrations == (record.answer,)
    assert record.reward is None


def test_metadata_is_what_the_scorer_takes() -> None:
    record = read_records(gym("chain_sum", size=1)).train[0]
    item = record.metadata["reasoning_gym"]
    assert json.loads(json.dumps(item))["dataset"] == "chain_sum"
    assert item["entry"]["question"] == record.messages[0]["content"]
    scorer: Any = reasoning_gym.get_score_answer_fn(item["dataset"])
    assert scorer(record.answer, item["entry"]) == 1.0
    assert scorer("no", item["entry"]) < 1.0


def test_written_solutions_of_gsm_symbolic() -> None:
    records = read_records(gym("gsm_symbolic", size=60, demonstrations="solution"), 10)
    for record in records.train:
        (text,) = record.demonstrations
        assert text == record.metadata["reasoning_gym"]["entry"]["metadata"]["answer_cot"]
        json.dumps(record.metadata)


def test_without_demonstrations() -> None:
    assert (
        read_records(gym("chain_sum", size=3, demonstrations="none")).train[0].demonstrations == ()
    )
    # chain_sum has no written solutions.
    records = read_records(gym("chain_sum", size=3, demonstrations="solution"))
    assert all(record.demonstrations == () for record in records.train)


def test_template_around_the_answer() -> None:
    config = gym("chain_sum", size=1, demonstration_template=r"\boxed{{demonstration}}")
    record = read_records(config).train[0]
    assert record.demonstrations == (rf"\boxed{{{record.answer}}}",)


def test_held_out_fills_a_small_space_and_the_rest_trains() -> None:
    config = gym("chain_sum", size=500, config={"max_terms": 2, "max_digits": 1})
    records = read_records(config, 100)
    assert len(records.copies) > 100
    assert len(records.train) + len(records.copies) == 500


def test_too_many_held_out() -> None:
    config = gym("chain_sum", size=500, config={"max_terms": 2, "max_digits": 1})
    with pytest.raises(DataError, match=r"only \d+ different problems.*lower eval\.num_prompts"):
        read_records(config, 400)


def test_neighbouring_seeds_share_nothing_but_chance() -> None:
    """reasoning-gym itself gives item i of seed s the problem of item i - 1 of seed s + 1."""
    first, second = (read_records(gym("gsm_symbolic", size=100, seed=s)).train for s in (0, 1))
    texts = [{record.messages[0]["content"] for record in records} for records in (first, second)]
    assert len(texts[0] & texts[1]) <= 2


def test_composite_items_name_the_set_that_scores_them() -> None:
    parts = [{"name": name, "weight": 1} for name in ("chain_sum", "leg_counting")]
    records = read_records(gym("composite", size=20, config={"datasets": parts})).train
    named = {record.metadata["reasoning_gym"]["dataset"] for record in records}
    assert named == {"chain_sum", "leg_counting"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (gym("chain_sums"), "data.dataset = 'chain_sums': .*did you mean chain_sum"),
        (gym("chain_sum", config={"terms": 2}), "data.config = .*chain_sum refuses it.*terms"),
        (gym("chain_sum", config={"min_terms": 9, "max_terms": 3}), "max_terms must be"),
        (gym("chain_sum", config={"seed": 9}), "data.config.seed = 9: set data.seed"),
        (gym("composite"), "data.config = .*datasets"),
    ],
)
def test_wrong_config(config: ReasoningGymData, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_records(config)


def test_the_same_in_every_process() -> None:
    code = (
        "from plait.rollouts.config import ReasoningGymData\n"
        "from plait.rollouts.readers import read_records\n"
        "for name in ('chain_sum', 'gsm_symbolic'):\n"
        "    c = ReasoningGymData(type='reasoning_gym', dataset=name, size=40)\n"
        "    print([r.messages for r in read_records(c, 8).train])\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize("dataset", ["chain_sum", "gsm_symbolic"])
def test_two_thousand_load_quickly(tokenizer: Any, dataset: str) -> None:
    start = time.perf_counter()
    config = gym(dataset, size=2000)
    data = load_data(
        config, tokenizer, num_eval=128, max_prompt_length=1024, max_response_length=256
    )
    assert time.perf_counter() - start < 3
    assert data.report.kept + sum(data.report.dropped.values()) == 2000
    assert all(prompt.demonstrations for prompt in data.take_experts(128))
