"""The recipes of docs/data.md are valid, and what a `data` section gets wrong is named with its place."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from plait.engine.errors import ConfigError
from plait.launch.config import load_recipe, validate
from plait.rollouts.config import (
    CurriculumSampling,
    DifficultySampling,
    MixtureData,
    ReasoningGymData,
)
from plait.rollouts.data_report import CONTROL_TOKEN, COPY, REFUSED, TOO_LONG
from plait.rollouts.records import TOO_LONG_ID
from plait.rollouts.rows import (
    BROKEN,
    CONTRADICTORY,
    DUPLICATE,
    EMPTY,
    MISSING,
    NOT_TEXT,
    TOO_LARGE,
    WRONG_TYPE,
)

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
SNIPPETS = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
RECIPE: dict[str, Any] = {
    "run": {"name": "x"},
    "model": "m",
    "algorithm": {"type": "grpo"},
    "reward": "math",
    "loop": {"steps": 1, "prompts_per_step": 2},
}


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_are_valid(number: int, tmp_path: Path) -> None:
    recipe = validate({**RECIPE, **yaml.safe_load(SNIPPETS[number])})
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path).data == recipe.data


def test_snippets_say_what_they_are_shown_for() -> None:
    data = [validate({**RECIPE, **yaml.safe_load(text)}).data for text in SNIPPETS]
    (mixture,) = [section for section in data if isinstance(section, MixtureData)]
    assert [part.label for part in mixture.parts] == ["chain_sum", "countdown", "traces"]
    kinds = {type(section.sampling) for section in data}
    assert kinds >= {DifficultySampling, CurriculumSampling}
    assert any(section.filter for section in data)


def test_every_reason_is_on_the_page() -> None:
    text = PAGE.read_text()
    reasons = (
        *(BROKEN, CONTRADICTORY, DUPLICATE, EMPTY, MISSING, NOT_TEXT, TOO_LARGE, WRONG_TYPE),
        *(TOO_LONG_ID, TOO_LONG, CONTROL_TOKEN, REFUSED, COPY),
    )
    assert [reason for reason in reasons if f"`{reason}`" not in text] == []


def test_short_form_of_sampling() -> None:
    data = validate(
        {**RECIPE, "data": {"type": "reasoning_gym", "dataset": "x", "sampling": "difficulty"}}
    ).data
    assert isinstance(data, ReasoningGymData)
    assert isinstance(data.sampling, DifficultySampling)


@pytest.mark.parametrize("asked", [{"sampling": "difficulty"}, {"filter": {"solved_after": 2}}])
def test_rates_need_rollouts(asked: dict[str, Any]) -> None:
    data = {"type": "jsonl", "path": "a", **asked}
    (field,) = asked
    with pytest.raises(ConfigError, match=f"data.{field}: .*algorithm.type = 'sft' has none"):
        validate({**RECIPE, "algorithm": {"type": "sft"}, "data": data})
    assert validate({**RECIPE, "data": data}).data.observing == field


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"type": "parquet", "path": "x"}, "data: there is no type 'parquet'; did you mean `type: hug"),
        ({"type": "mixture"}, "data.parts = None: required"),
        (
            {"type": "mixture", "parts": [{"weight": 1, "data": {"type": "csv"}}]},
            "data.parts.0.data: there is no type 'csv'",
        ),
        (
            {"type": "mixture", "parts": [{"weight": 1, "data": {"type": "jsonl", "path": "a", "seed": 3}}]},
            "data.parts.0.data.seed = 3: unknown key; known here: ",
        ),
        ({"type": "jsonl", "path": "a", "sampling": "hard"}, "data.sampling: Input tag 'hard' found"),
        ({"type": "jsonl", "path": "a", "filter": {}}, "data.filter: filters nothing; set solved_after"),
        ({"type": "jsonl", "path": "a", "filter": {"solved": 1}}, "did you mean 'solved_after'?"),
    ],
)  # fmt: skip
def test_errors_name_the_place(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate({**RECIPE, "data": data})
    assert message in str(caught.value)
