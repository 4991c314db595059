"""A data set's folder is data: no code of it runs, nothing outside of it is read (fault F30)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets.config
import pytest

from plait.engine.errors import ConfigError, DataError
from plait.rollouts.config import HuggingFaceData
from plait.rollouts.readers import read_records

ROW = {"prompt": "2+2?"}
SECRET = {"prompt": "the secret"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a data set, beside a file that it has no business with."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "secret.jsonl").write_text(json.dumps(SECRET) + "\n")
    folder = tmp_path / "set"
    folder.mkdir()
    return folder


def read(folder: Path, **config: Any) -> list[str]:
    records = read_records(HuggingFaceData(type="huggingface", path=str(folder), **config))
    return [record.messages[0]["content"] for record in records.train]


def write(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row) + "\n")


def test_links_that_lead_out_are_refused(home: Path) -> None:
    write(home / "train.jsonl", ROW)
    (home / "more.jsonl").symlink_to("../secret.jsonl")
    with pytest.raises(DataError, match=r"more\.jsonl: a link that leads out of .*copy the data"):
        read(home)
    (home / "more.jsonl").unlink()
    (home / "deep").symlink_to(home.parent)
    with pytest.raises(DataError, match="deep: a link that leads out of"):
        read(home)


def test_links_that_stay_inside_are_data(home: Path) -> None:
    write(home / "data" / "train.jsonl", ROW)
    (home / "data" / "train-2.jsonl").symlink_to("train.jsonl")
    assert set(read(home)) == {"2+2?"}


@pytest.mark.parametrize(
    "listed",
    ["../secret.jsonl", "data/../../secret.jsonl", "{outside}", "https://example.org/x.jsonl"],
)
def test_a_card_that_lists_other_files_is_refused(
    home: Path, listed: str, measured: Callable[[str, str], None]
) -> None:
    write(home / "train.jsonl", ROW)
    listed = listed.replace("{outside}", str(home.parent / "secret.jsonl"))
    (home / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {listed}\n---\n"
    )
    with pytest.raises(DataError, match=r"README\.md: names .* not inside the data set's folder"):
        read(home)
    measured("F30", "data sets: paths escaped 0/4")


def test_a_card_that_lists_its_own_files_is_read(home: Path) -> None:
    write(home / "a" / "one.jsonl", ROW)
    write(home / "b" / "two.jsonl", SECRET)
    (home / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a/*.jsonl\n---\n"
        "Sums of two numbers, made by ../make.py.\n"
    )
    assert read(home) == ["2+2?"]


def test_a_saved_set_that_lists_other_files_is_refused(home: Path) -> None:
    outside = home.parent / "outside"
    datasets.Dataset.from_list([SECRET]).save_to_disk(outside)
    saved = home / "saved"
    datasets.Dataset.from_list([ROW]).save_to_disk(saved)
    assert read(saved) == ["2+2?"]
    state = json.loads((saved / "state.json").read_text())
    (arrow,) = [file["filename"] for file in state["_data_files"]]
    state["_data_files"] = [{"filename": f"../../outside/{arrow}"}]
    (saved / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"state\.json: names '\.\./\.\./outside"):
        read(saved)


def test_splits_are_folders_of_the_set(home: Path) -> None:
    datasets.Dataset.from_list([SECRET]).save_to_disk(home.parent / "outside")
    saved = home / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_list([ROW])}).save_to_disk(saved)
    assert read(saved) == ["2+2?"]
    (saved / "dataset_dict.json").write_text('{"splits": ["../../outside"]}')
    with pytest.raises(DataError, match=r"dataset_dict\.json: names '\.\./\.\./outside'"):
        read(saved, split="../../outside")


@pytest.mark.parametrize("with_rows", [True, False])
def test_no_code_of_a_data_set_runs(
    home: Path, with_rows: bool, measured: Callable[[str, str], None]
) -> None:
    """A script by the folder's name, which old versions of `datasets` ran."""
    canary = home.parent / "canary"
    (home / "set.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    if with_rows:
        write(home / "train.jsonl", ROW)
    with pytest.raises(DataError, match="datasets cannot load it"):
        read(home)
    assert not canary.exists()
    measured("F30", "data sets: code run 0")


def test_a_script_is_no_data_file(home: Path) -> None:
    canary = home.parent / "canary"
    script = home / "set.py"
    script.write_text(f"open({str(canary)!r}, 'w').close()\n")
    with pytest.raises(ConfigError, match="unknown file type"):
        read(script)
    assert not canary.exists()
