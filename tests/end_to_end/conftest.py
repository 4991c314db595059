"""A folder with data, as a user would have it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("work")
    rows = [
        {"prompt": f"{i} + {j} =", "answer": str(i + j), "demonstration": f"\\boxed{{{i + j}}}"}
        for i in range(8)
        for j in range(5)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # A random model never adds up; a reward that it sometimes earns makes groups with a signal.
    (folder / "parity.py").write_text(
        "from plait.engine.types import Score\n\n"
        "def grade(prompt, completion):\n"
        "    return Score.ok(len(completion) % 2, answer=completion)\n"
    )
    return folder
