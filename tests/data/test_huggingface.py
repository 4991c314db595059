"""Hugging Face data sets, all local: files, folders of files, folders written by save_to_disk."""

from pathlib import Path
from typing import Any

import datasets.config
import pytest

from plait.engine.errors import ConfigError, DataError, HubError
from plait.rollouts.config import Columns, HuggingFaceData
from plait.rollouts.readers import read_records
from plait.rollouts.records import Record

ROWS = {"question": ["1+1?", "2+2?", "3+3?"], "answer": ["2", "4", "6"]}
COLUMNS = Columns(prompt="question")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def read(path: Path | str, **config: Any) -> list[Record]:
    config = {"columns": COLUMNS} | config
    return list(read_records(HuggingFaceData(type="huggingface", path=str(path), **config)).train)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".json", ".jsonl"])
def test_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    table = datasets.Dataset.from_dict(ROWS)
    if suffix == ".parquet":
        table.to_parquet(path)
    elif suffix in (".csv", ".tsv"):
        table.to_csv(path, sep="," if suffix == ".csv" else "\t")
    else:
        table.to_json(path)
    records = read(path)
    assert [record.messages[0]["content"] for record in records] == ROWS["question"]
    assert [record.answer for record in records] == ROWS["answer"]
    assert [record.prompt_id for record in records] == [f"rows{suffix}/{i}" for i in range(3)]


def test_splits_of_a_file(tmp_path: Path) -> None:
    datasets.Dataset.from_dict(ROWS).to_parquet(tmp_path / "rows.parquet")
    assert len(read(tmp_path / "rows.parquet", split="test[:2]")) == 2
    assert len(read(tmp_path / "rows.parquet", max_rows=1)) == 1


def test_saved_to_disk(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "two")
    assert len(read(tmp_path / "one")) == 3
    assert len(read(tmp_path / "two", split="test")) == 1
    with pytest.raises(ConfigError, match=r"data\.split = 'validation'"):
        read(tmp_path / "two", split="validation")


def test_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(ROWS).to_parquet(tmp_path / "set" / "train.parquet")
    assert read(tmp_path / "set")[0].prompt_id == "set/0"


def test_conversations(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    datasets.Dataset.from_list([{"messages": turns}]).to_parquet(tmp_path / "chat.parquet")
    (record,) = read(tmp_path / "chat.parquet", columns=Columns())
    assert record.demonstrations == ("2",)


def test_errors_name_the_row(tmp_path: Path) -> None:
    rows = {"question": ["1+1?", "", None], "answer": ["2", "4", "6"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError) as caught:
        read(tmp_path / "rows.parquet")
    assert "row 1: 'question' is empty" in str(caught.value)
    assert "row 2: 'question' must be a text, not null" in str(caught.value)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        read(tmp_path / "none")
    with pytest.raises(ConfigError, match="no such file or folder"):
        read("none.parquet")
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(ConfigError, match="unknown file type"):
        read(tmp_path / "rows.txt")
    (tmp_path / "broken.parquet").write_text("x")
    with pytest.raises(DataError, match="datasets cannot load it"):
        read(tmp_path / "broken.parquet")
    with pytest.raises(
        HubError, match=r"data.path = 'no-such-org/no-such-set'.* hub does not answer"
    ):
        read("no-such-org/no-such-set")
