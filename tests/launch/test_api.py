"""Recipes and rewards as Python objects."""

from pathlib import Path

import pytest

import plait
from plait.engine.errors import ConfigError
from plait.launch.api import load
from plait.launch.run import check_inputs
from plait.rewards import object_name
from plait.rewards.exact import grade_exact


def own_reward(prompt, completion):
    return 1.0


@pytest.fixture
def sections(tmp_path: Path, tiny_model: Path) -> dict:
    rows = "".join(f'{{"prompt": "{i}?", "answer": "{i}"}}\n' for i in range(9))
    (tmp_path / "rows.jsonl").write_text(rows)
    return {
        "run": {"name": "mine", "dir": str(tmp_path)},
        "model": str(tiny_model),
        "algorithm": {"type": "grpo"},
        "data": {"type": "jsonl", "path": str(tmp_path / "rows.jsonl")},
        "loop": {"steps": 2, "prompts_per_step": 2},
        "eval": {"num_prompts": 2},
    }


def test_importing_the_package_offers_the_api() -> None:
    assert callable(plait.train)
    assert callable(plait.resume)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = plait.trian  # type: ignore[attr-defined]


def test_functions_are_named_after_the_module_that_holds_them() -> None:
    assert object_name(grade_exact) == "plait.rewards.exact:grade_exact"
    assert object_name(lambda prompt, text: 1.0).startswith("object:")


def test_a_recipe_of_sections_takes_overrides_and_a_function(sections: dict) -> None:
    def local(prompt, completion):
        return 0.5

    recipe = load(sections, ["loop.steps=3"], local)
    assert (recipe.loop.steps, sections["loop"]["steps"]) == (3, 2)
    assert recipe.reward is not None
    name = recipe.reward.function
    assert name.startswith("object:")
    assert check_inputs(recipe, reward=local).reward is local
    with pytest.raises(ConfigError, match="pass it again"):
        check_inputs(recipe)
    with pytest.raises(ConfigError, match="the function passed is"):
        check_inputs(recipe, reward=own_reward)


def test_other_reward_settings_stay(sections: dict) -> None:
    recipe = load({**sections, "reward": {"function": "exact", "num_workers": 3}}, [], own_reward)
    assert recipe.reward is not None
    assert recipe.reward.num_workers == 3
    assert recipe.reward.function.endswith("own_reward")


def test_a_recipe_without_a_name_is_refused(sections: dict) -> None:
    del sections["run"]
    with pytest.raises(ConfigError, match=r"run\.name"):
        load(sections, [], own_reward)
