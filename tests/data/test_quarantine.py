"""The quarantine file: readable, bounded, and never told the same row twice."""

import json
from pathlib import Path
from typing import Any

from plait.rollouts.quarantine import MAX_TEXT, Quarantined, append


def row(**values: Any) -> Quarantined:
    given: Any = {
        "source": "rows.jsonl", "where": "line 7", "prompt_id": "a", "reason": "empty text", "row": {},
    }  # fmt: skip
    given |= values
    return given


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_written_once(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    assert append(path, [row(), row(reason="broken JSON"), row()]) == 2
    assert append(path, [row(), row(where="line 8", prompt_id=None)]) == 1
    assert [(x["where"], x["reason"]) for x in lines(path)] == [
        ("line 7", "empty text"),
        ("line 7", "broken JSON"),
        ("line 8", "empty text"),
    ]


def test_long_texts_are_cut_and_surrogates_written(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    append(path, [row(row={"prompt": "x" * 10_000_000, "turns": [{"content": "\ud800"}]})])
    assert path.stat().st_size < 2 * MAX_TEXT
    (line,) = lines(path)
    assert line["row"]["prompt"].endswith("... (9,998,000 more characters)")
    assert line["row"]["turns"][0]["content"] == "\ud800"


def test_a_torn_last_line_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    append(path, [row()])
    path.write_text(path.read_text() + '{"source": "rows.js')
    assert append(path, [row(where="line 8")]) == 1
    assert append(path, [row(), row(where="line 8")]) == 0
