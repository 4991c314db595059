"""A recipe that holds a secret is refused, and the message does not repeat it."""

from __future__ import annotations

import sys

import pytest

from plait.engine.errors import ConfigError
from plait.launch import cli
from plait.launch.config import validate

CANARY = "sk-canary-77f1"
RECIPE = {
    "run": {"name": "held"},
    "model": "some/model",
    "algorithm": {"type": "chord"},
    "data": {"type": "jsonl", "path": "data.jsonl"},
    "reward": {"function": "judge", "options": {"base_url": "http://host/v1", "model": "m"}},
    "loop": {"steps": 1},
}


def with_option(key: str, value: object) -> dict:
    options = {**RECIPE["reward"]["options"], key: value}
    return {**RECIPE, "reward": {"function": "judge", "options": options}}


@pytest.mark.parametrize(
    "key",
    [
        "api_key",
        "openai_api_key",
        "apiKey",
        "password",
        "token",
        "hf_token",
        "auth_token",
        "client_secret",
    ],
)
def test_a_secret_is_refused_and_not_repeated(key):
    with pytest.raises(ConfigError) as caught:
        validate(with_option(key, CANARY))
    assert f"reward.options.{key}" in str(caught.value)
    assert "environment variable" in str(caught.value)
    assert CANARY not in str(caught.value)


def test_a_url_with_a_password_is_refused():
    with pytest.raises(ConfigError) as caught:
        validate(with_option("base_url", f"https://me:{CANARY}@host/v1"))
    assert "reward.options.base_url" in str(caught.value)
    assert CANARY not in str(caught.value)


def test_a_password_of_digits_is_one():
    with pytest.raises(ConfigError) as caught:
        validate(with_option("password", 77123456))
    assert "77123456" not in str(caught.value)


def test_names_and_numbers_are_no_secrets():
    validate(with_option("api_key_env", "MY_KEY"))
    validate(with_option("max_tokens", 10))
    validate(with_option("end_token", "</s>"))
    validate(with_option("api_key", None))


def test_an_unknown_key_beside_it_does_not_bring_it_out(tmp_path, monkeypatch, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\n")
    monkeypatch.setattr(sys, "argv", ["plait", "train", str(file), f"learner.api_key={CANARY}"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert CANARY not in said.out + said.err
    assert "learner.api_key" in said.err
