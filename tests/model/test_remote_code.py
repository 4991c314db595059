"""F30: code that lies beside a model's weights never runs, whether the model is refused or used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from plait.engine.errors import ConfigError
from plait.launch.model import check_model, resolve_model

AUTO_MAP = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModelForCausalLM": "evil.EvilModel",
    "AutoTokenizer": ["evil.EvilTokenizer", None],
}


@pytest.fixture
def trap(tmp_path, tiny_model) -> Path:
    """A copy of the tiny model with a file that leaves a canary when it is imported."""
    folder = tmp_path / "trap"
    shutil.copytree(tiny_model, folder)
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    return folder


def change(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("file", "key"), [("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")]
)
def test_f30_what_only_its_own_code_can_load_is_refused(trap, file, key, measured):
    change(trap / file, auto_map=AUTO_MAP, **{key: "Evil"})
    with pytest.raises(ConfigError, match="auto_map") as caught:
        check_model(str(trap))
    assert file in str(caught.value)
    assert "Evil" in str(caught.value)
    assert not (trap.parent / "canary").exists()
    measured("F30", "models: 2 of 2 that need their own code refused")


def test_f30_code_beside_a_known_architecture_is_ignored(trap, measured):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    for file in ("config.json", "tokenizer_config.json"):
        change(trap / file, auto_map=AUTO_MAP)
    path = resolve_model(str(trap))
    for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        kind.from_pretrained(path)
    assert not (trap.parent / "canary").exists()
    measured("F30", "models: code imported 0")
