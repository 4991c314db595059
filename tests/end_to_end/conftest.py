"""A folder with data, as a user would have it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from end_to_end.command_line import write_parity


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("work")
    rows = [
        {"prompt": f"{i} + {j} =", "answer": str(i + j), "demonstration": f"\\boxed{{{i + j}}}"}
        for i in range(8)
        for j in range(5)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_parity(folder)
    return folder
