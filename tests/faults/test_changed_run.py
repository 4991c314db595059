"""F18: a run whose recipe, data, tokenizer or model has changed is not resumed, and says what has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from end_to_end.command_line import tiny_recipe
from plait.engine.errors import ConfigError, DataError
from plait.launch import run
from plait.launch.config import validate
from plait.launch.identity import identity_of, record
from plait.launch.run_folder import CONFIG_FILE, prepare_folder
from plait.launch.run_lock import lock_run

TOLERANCE = {"relative_tolerance": 0.0}


class Started(Exception):
    """The run would have gone on."""


def start_nothing(*_: object, **__: object) -> None:
    raise Started


class Place:
    """A run that has ended, with everything that it is made of."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, folder / "model"
        shutil.copytree(model, self.model)
        self.data = folder / "data.jsonl"
        self.rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(12)]
        self.write_rows()
        raw = tiny_recipe(self.model, data={"path": str(self.data)})
        raw["algorithm"] = {"type": "grpo", "rollouts_per_prompt": 4}
        raw["run"] = {"name": "changed", "dir": str(folder)}
        raw["eval"] = {"num_prompts": 2}
        raw["reward"] = {"function": "numeric", "options": TOLERANCE}
        self.recipe = validate(raw)
        self.run = self.recipe.folder
        with lock_run(self.run):
            prepare_folder(self.recipe, overwrite=False)
            record(self.run, identity_of(self.recipe, str(self.model)))
        self.data_state = self.load_data(self.recipe).state_dict()

    def write_rows(self) -> None:
        self.data.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def load_data(self, recipe: Any) -> Any:
        return run.load_prompts(run.check_inputs(recipe), str(self.model))

    def edit(self, *path: str, value: object) -> None:
        """Change the run's own config.yaml, as an editor would."""
        file = self.run / CONFIG_FILE
        raw = section = yaml.safe_load(file.read_text())
        for name in path[:-1]:
            section = section[name]
        section[path[-1]] = value
        file.write_text(yaml.safe_dump(raw, sort_keys=False))

    def resume(self, *overrides: str) -> None:
        """Up to where workers would start, and the data's own check."""
        named = [override.partition("=")[0] for override in overrides]
        recipe = run.load_run(self.run, overrides)
        with pytest.raises(Started):
            run.train(recipe, resume=True, named=named)
        self.load_data(recipe).load_state_dict(self.data_state)


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch) -> Place:
    monkeypatch.setattr(run, "composed", start_nothing)
    return Place(tmp_path, tiny_model)


def flip_weight(place: Place) -> None:
    file = place.model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_answer(place: Place) -> None:
    place.rows[7]["prompt"] = "8 + 1 ="
    place.write_rows()


def append_row(place: Place) -> None:
    place.rows.append({"prompt": "20 + 1 =", "answer": "21"})
    place.write_rows()


def other_data(place: Place) -> list[str]:
    other = place.folder / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in place.rows[:-1]))
    return [f"data.path={other}"]


def other_model(place: Place) -> list[str]:
    from tiny_model import make_tiny_model

    other = make_tiny_model(place.folder / "other", heads=2, kv_heads=1, layers=1)
    return [f"model.path={other}"]


MUTATIONS: dict[str, tuple[Callable[[Place], Any], str]] = {
    "learning rate": (
        lambda p: p.edit("learner", "learning_rate", value=0.5),
        r"learner\.learning_rate: .* -> 0\.5",
    ),
    "group size": (
        lambda p: p.edit("algorithm", "rollouts_per_prompt", value=5),
        r"algorithm\.rollouts_per_prompt: 4 -> 5",
    ),
    "temperature": (
        lambda p: p.edit("rollouts", "temperature", value=0.5),
        r"rollouts\.temperature: .* -> 0\.5",
    ),
    "prompts of a step": (
        lambda p: p.edit("loop", "prompts_per_step", value=2),
        r"loop\.prompts_per_step: \d+ -> 2.*loop\.prompts_per_step=",
    ),
    "one more option of the reward": (
        lambda p: p.edit("reward", "options", value={**TOLERANCE, "absolute_tolerance": 1.0}),
        r"reward\.options: .* -> .*'absolute_tolerance': 1\.0",
    ),
    "algorithm": (
        lambda _: ["algorithm={type: ppo, rollouts_per_prompt: 4}"],
        r"algorithm\.type: 'grpo' -> 'ppo', which a run cannot change",
    ),
    "seed": (lambda _: ["run.seed=9"], r"run\.seed: 0 -> 9, which a run cannot change"),
    "a row": (change_answer, r"training prompts \(checkpoint: .*now:"),
    "one more row": (append_row, r"training prompts \(checkpoint: \d+ rows.*now: \d+ rows"),
    "another data set, by name": (other_data, r"training prompts \(checkpoint: "),
    "chat template": (
        lambda p: (p.model / "chat_template.jinja").write_text("{{ messages[0].content }}"),
        r"tokenizer: chat_template\.jinja .* -> ",
    ),
    "vocabulary": (
        lambda p: edit_json(p.model / "tokenizer.json", version="2.0"),
        r"tokenizer: tokenizer\.json \w{12} -> \w{12}",
    ),
    "one bit of a weight": (flip_weight, r"model: model\.safetensors \w{12} -> \w{12}"),
    "model configuration": (
        lambda p: edit_json(p.model / "config.json", rms_norm_eps=1e-3),
        r"model: config\.json \w{12} -> \w{12}",
    ),
    "another model, by name": (other_model, r"model: config\.json"),
}


def test_f18_what_has_changed_is_refused_with_the_difference(
    tmp_path_factory, tiny_model, monkeypatch, measured
):
    monkeypatch.setattr(run, "composed", start_nothing)
    for name, (mutate, difference) in MUTATIONS.items():
        place = Place(tmp_path_factory.mktemp("run"), tiny_model)
        place.resume()
        overrides = mutate(place)
        with pytest.raises((ConfigError, DataError), match=f"(?s){difference}") as refused:
            place.resume(*(overrides if isinstance(overrides, list) else ()))
        print(f"{name}: {refused.value}")
    measured("F18", f"{len(MUTATIONS)} of {len(MUTATIONS)} refused with the difference")


def test_a_named_field_may_change_and_stays_changed(place, capsys):
    place.resume("loop.steps=9", "learner.zero_stage=1")
    assert "changed: loop.steps: " in capsys.readouterr().out
    place.resume()  # the job that is started again names nothing
    assert "changed:" not in capsys.readouterr().out


def test_a_run_that_goes_on_says_no_more_that_it_has_ended(place):
    told = [place.run / name for name in ("summary.json", "status.json")]
    for file in told:
        file.write_text("{}")
    with pytest.raises(ConfigError):
        place.resume("run.seed=9")
    assert all(file.exists() for file in told), "nothing went on"
    place.resume("loop.steps=9")
    assert not any(file.exists() for file in told)


def test_what_changes_no_number_is_accepted(place):
    place.edit("checkpoint", "every", value=7)
    place.edit("rollouts", "sample_timeout_seconds", value=9.0)
    place.edit("learner", "silence_seconds", value=9.0)
    place.resume()


def test_a_folder_and_files_that_moved_are_the_same_run(place):
    moved = place.folder / "elsewhere"
    moved.mkdir()
    for path in (place.run, place.data, place.model):
        shutil.move(path, moved / path.name)
    place.run, place.model = moved / place.run.name, moved / "model"
    named = f"data.path={moved / 'data.jsonl'}", f"model.path={place.model}"
    with pytest.raises(ConfigError, match="model"):
        place.resume()
    place.resume(*named)


def test_a_damaged_identity_is_not_taken_for_a_new_run(place):
    (place.run / "identity.json").write_text("{}")
    with pytest.raises(Exception, match=r"identity\.json"):
        place.resume()
