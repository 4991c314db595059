"""A run on a mixture with rewards of its own, bad rows that are dropped, and prompts chosen by their rollouts."""

from __future__ import annotations

import json
from pathlib import Path

from end_to_end.command_line import plait, read_lines, tiny_recipe, write_recipe

RATES = {"data/visited", "data/solved", "data/hopeless", "data/active", "data/rejoined"}


def test_a_mixture_trains_and_accounts_for_every_row(work_folder, tiny_model):
    rows = (work_folder / "data.jsonl").read_text()
    (work_folder / "dirty.jsonl").write_text(rows + '{"prompt": ""}\n{broken\n')
    recipe = tiny_recipe(tiny_model, rollouts={"max_prompt_length": 200})
    recipe["algorithm"] = {"type": "grpo", "rollouts_per_prompt": 2}
    gym = {"type": "reasoning_gym", "dataset": "chain_sum", "size": 40}
    recipe["data"] = {
        "type": "mixture",
        "sampling": "difficulty",
        "filter": {"hopeless_after": 1},
        "parts": [
            {"weight": 3, "name": "gym", "reward": "reasoning_gym", "data": gym},
            {"weight": 1, "data": {"type": "jsonl", "path": "dirty.jsonl", "bad_rows": "drop"}},
        ],
    }
    plait(work_folder, "train", write_recipe(work_folder, "mixture.yaml", recipe))
    folder = work_folder / "runs" / "mixture"
    data = json.loads((folder / "summary.json").read_text())["data"]
    assert data["dropped"] == {"empty text": 1, "broken JSON": 1}
    # 40 and 5 held-out problems are generated, 42 rows are in the file.
    assert data["rows"] == 87 == data["kept"] + data["held_out"] + 2
    assert data["held_out"] == 6
    assert sum(data["parts"].values()) == data["kept"]
    assert [row["where"] for row in read_lines(folder / "quarantine.jsonl")] == [
        "line 41",
        "line 42",
    ]
    steps = [row for row in read_lines(folder / "metrics.jsonl") if "reward/mean" in row]
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert all(f"`{name}`" in page for name in (*RATES, "data/success_rate"))
    for number, row in enumerate(steps, start=1):
        assert (row["mixture/prompts/gym"], row["mixture/prompts/dirty"]) == (3, 1)
        assert row.keys() >= RATES
        assert row["data/visited"] == 4 * number, "hopeless prompts are not drawn again"
        assert row["data/active"] + row["data/hopeless"] == data["kept"]
    assert len(steps) == 3
