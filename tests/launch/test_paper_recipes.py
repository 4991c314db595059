"""The recipes of launch/recipes/paper: valid and planned without network, and what was not seen is said."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from plait.algorithms import ALGORITHMS
from plait.launch.architectures import KNOWN, known_architecture
from plait.launch.cli import app
from plait.launch.config import RECIPES, load_recipe
from plait.launch.plan import model_size
from plait.rollouts.config import Columns, JsonlData
from plait.rollouts.readers import read_records

PAPER = sorted(file.stem for file in (RECIPES / "paper").glob("*.yaml"))


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", PAPER)
def test_sections_are_checked_and_silence_of_the_hub_is_said(name):
    output = run("check", "recipe", f"paper/{name}")
    assert output.startswith("ok: every section of the recipe is valid; its data was not seen")
    assert "not checked: model.path" in output
    assert "not checked: data.path" in output
    answer = json.loads(run("check", "recipe", f"paper/{name}", "--json"))
    assert answer["ok"]
    assert "train" not in answer, "unknown is not 0"
    assert len(answer["unchecked"]) == 2


@pytest.mark.parametrize("name", PAPER)
def test_the_plan_fits_eight_gpus_of_80_gb(name):
    plan = json.loads(run("plan", f"paper/{name}", "--json"))
    recipe = load_recipe(f"paper/{name}")
    assert recipe.learner.num_workers + recipe.rollouts.num_workers == 8
    assert plan["learner_gib_per_rank"] < 70
    assert plan["rollout_gib_per_worker"] < 70
    assert any("shape of" in note for note in plan["notes"])
    assert "not checked" in run("plan", f"paper/{name}")


def test_a_run_is_still_refused_without_the_hub(tmp_path, monkeypatch):
    from plait.engine.errors import HubError
    from plait.launch.run import train

    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError, match=r"model.path"):
        train(load_recipe("paper/chord"))
    assert not (tmp_path / "runs").exists()


def test_known_shapes_have_the_published_number_of_parameters():
    """7.62 B and 3.09 B, as their cards say."""
    sizes = {name: model_size(known_architecture(name))[0] for name in KNOWN}
    assert sizes["Qwen/Qwen2.5-Math-7B"] == 7_615_616_512
    assert sizes["Qwen/Qwen2.5-3B"] == 3_085_938_688


def test_every_method_has_a_recipe():
    used = {
        config.type
        for name in PAPER
        for config in load_recipe(f"paper/{name}").algorithm.sections.values()
    }
    assert used >= ALGORITHMS.keys() - {"stages"}


def test_columns_inside_cells(tmp_path):
    """The rows of the LUFFY family's data set, as its card shows them."""
    row = {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "target": [{"role": "assistant", "content": "It is 4."}],
        "reward_model": {"ground_truth": "4", "style": "rule"},
    }
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    columns = load_recipe("paper/luffy").data.columns  # type: ignore[union-attr]
    assert isinstance(columns, Columns)
    config = JsonlData(type="jsonl", path=str(file), columns=columns)
    (record,) = read_records(config).train
    assert record.answer == "4"
    assert record.demonstrations == ("It is 4.",)
    assert record.messages[-1]["content"] == "2+2?"
