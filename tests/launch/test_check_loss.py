"""`plait check loss` on every registered algorithm: two real DeepSpeed ranks, ZeRO 1, 2 and 3."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from end_to_end.command_line import plait, tiny_recipe, write_recipe
from end_to_end.test_every_algorithm import CONFIGS
from plait.algorithms import ALGORITHMS
from plait.engine.batch import count
from plait.engine.errors import ConfigError
from plait.engine.process_ranks import ProcessRanks
from plait.launch import check_loss as module
from plait.launch.check_loss import check_loss, parse_stages
from plait.launch.config import load_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Solutions of several sentences, so that there are pieces to hint with."""
    folder = tmp_path_factory.mktemp("check-loss")
    rows = [
        {
            "prompt": f"{i} + {j} =",
            "answer": str(i + j),
            "demonstration": f"Take {i}. Add {j}. So {i + j}.",
        }
        for i in range(4)
        for j in range(4)
    ]
    (folder / "solutions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def ranks():
    """Started once; each algorithm and stage makes fresh learners in them."""
    opened = ProcessRanks(2, 300.0)
    yield opened
    opened.close()


def recipe_file(name: str, tiny_model, folder) -> str:
    recipe = tiny_recipe(
        tiny_model, data={"path": "solutions.jsonl"}, rollouts={"max_response_length": 24}
    )
    recipe["algorithm"] = {"type": name, **CONFIGS.get(name, {})}
    if "rollouts_per_prompt" in ALGORITHMS[name].Config.model_fields:
        recipe["algorithm"]["rollouts_per_prompt"] = 3
    return write_recipe(folder, f"{name}.yaml", recipe)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_is_green_for(name, tiny_model, folder, ranks, monkeypatch):
    monkeypatch.chdir(folder)
    recipe = load_recipe(recipe_file(name, tiny_model, folder))
    report = check_loss(recipe, (1, 2, 3), ranks)
    assert report.ok, "\n".join(report.lines())
    assert {c.loss for c in report.comparisons} == set(recipe.build_algorithm().losses)
    stages = {c.zero_stage for c in report.comparisons if c.ranks == 2}
    assert stages == {1, 2, 3}


def test_expert_rows_are_moved_between_ranks(tiny_model, folder, ranks, monkeypatch):
    monkeypatch.chdir(folder)
    recipe = load_recipe(recipe_file("chord", tiny_model, folder))
    cuts = {c.cut for c in check_loss(recipe, (1,), ranks).comparisons if c.ranks == 2}
    assert cuts == {"rows dealt in turn", "expert rows on rank 1 only", "rank 1 without a row"}


def test_it_fails_where_each_micro_batch_divides_by_its_own_counts(
    tiny_model, folder, ranks, monkeypatch
):
    monkeypatch.chdir(folder)
    right = module.cut

    def wrong(minibatch, plan):
        parts, *rest = right(minibatch, plan)
        return [replace(p, denom=count(p)) if p.num_rows else p for p in parts], *rest

    monkeypatch.setattr(module, "cut", wrong)
    report = check_loss(load_recipe(recipe_file("sft", tiny_model, folder)), (2,), ranks)
    assert not report.ok
    failed = {(c.ranks, c.cut) for c in report.comparisons if not c.ok}
    assert {(1, "micro-batches of 1"), (2, "rows dealt in turn")} <= failed
    assert any(line.startswith("FAIL") for line in report.lines())


def test_the_command_prints_one_json_object(tiny_model, folder):
    done = plait(
        folder, "check", "loss", recipe_file("grpo", tiny_model, folder), "--zero", "1", "--json"
    )
    report = json.loads(done.stdout)
    assert report["ok"]
    assert report["notes"][0].startswith("rewards: synthetic")
    assert {c["zero_stage"] for c in report["comparisons"]} == {0, 1}


@pytest.mark.parametrize("text", ["", "4", "1,x", "1,,2"])
def test_stages_that_do_not_exist_are_named(text):
    with pytest.raises(ConfigError, match="--zero"):
        parse_stages(text)
