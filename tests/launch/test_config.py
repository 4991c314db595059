"""Recipes: overrides, defaults, shipped files, and that a resolved recipe loads to itself."""

import pytest

from plait.engine.errors import ConfigError
from plait.launch.config import RECIPES, load_recipe

MINIMAL = """
model: some/model
algorithm: {type: chord}
data: {type: jsonl, path: data.jsonl}
reward: math
loop: {steps: 3}
"""


@pytest.fixture
def minimal(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(MINIMAL)
    return file


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_are_valid_and_load_to_themselves(file, tmp_path):
    recipe = load_recipe(file)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml())
    assert load_recipe(resolved) == recipe


def test_overrides_are_yaml_and_reach_any_depth(minimal):
    recipe = load_recipe(
        minimal,
        [
            "loop.steps=7",
            "algorithm.expert_loss.type=phi",
            "learner.learning_rate=1e-5",
            "run.name=x",
        ],
    )
    assert recipe.loop.steps == 7
    assert recipe.model_dump()["algorithm"]["expert_loss"]["type"] == "phi"
    assert recipe.learner.learning_rate == 1e-5
    assert recipe.folder.name == "x"


def test_short_forms_stand_for_sections(minimal):
    recipe = load_recipe(minimal, ["reward.timeout_seconds=3"])
    assert recipe.model.path == "some/model"
    assert recipe.reward is not None
    assert (recipe.reward.function, recipe.reward.timeout_seconds) == ("math", 3)


def test_the_run_is_named_after_the_file(minimal):
    assert load_recipe(minimal).run.name == "mine"


def test_the_response_limit_is_shared_unless_it_contradicts(minimal):
    recipe = load_recipe(minimal, ["rollouts.max_response_length=64"])
    assert recipe.algorithm.max_response_length == 64
    with pytest.raises(ConfigError, match=r"rollouts.max_response_length = 64"):
        load_recipe(minimal, ["rollouts.max_response_length=64", "algorithm.max_response_length=8"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loop.steps", "key.path=value"),
        ("model.path.x=3", "holds a value, not a section"),
        ("data.type=parquet", "data"),
        ("data.columns.promt=q", "did you mean 'prompt'"),
        ("learner.parameter_selection={type: lora, rnak: 4}", "did you mean 'rank'"),
    ],
)
def test_bad_overrides_are_named(minimal, override, words):
    with pytest.raises(ConfigError) as caught:
        load_recipe(minimal, [override])
    assert words in str(caught.value)


def test_a_key_given_twice_is_refused(minimal):
    minimal.write_text(MINIMAL + "reward: exact\n")
    with pytest.raises(ConfigError, match="given twice"):
        load_recipe(minimal)


def test_a_missing_recipe_names_the_shipped_ones():
    with pytest.raises(ConfigError, match="quickstart"):
        load_recipe("quikstart")
