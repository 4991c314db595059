"""`plait eval` on SmolLM2 agrees with a direct count on the same completions, and pass@k with its closed form."""

from __future__ import annotations

import json
from collections import defaultdict
from math import comb
from pathlib import Path
from statistics import fmean

import pytest
from math_verify import parse, verify

from end_to_end.command_line import plait, read_lines, write_recipe
from end_to_end.test_smollm2 import recipe

PROMPTS, ROLLOUTS = 24, 4


def test_eval_agrees_with_a_direct_count(tmp_path: Path) -> None:
    write_recipe(tmp_path, "sums.yaml", {**recipe("chord"), "eval": {"num_prompts": PROMPTS}})
    several = (f"eval.rollouts_per_prompt={ROLLOUTS}", "eval.temperature=1.0")
    done = plait(tmp_path, "eval", "sums.yaml", *several, "--output", "completions.jsonl", "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    rows = read_lines(tmp_path / "completions.jsonl")
    assert len(rows) == PROMPTS * ROLLOUTS == result["num_scored"]
    right: dict[str, int] = defaultdict(int)
    for row in rows:
        right[row["prompt_id"]] += verify(parse(row["answer"]), parse(row["text"]))
    assert 0 < sum(right.values()) < len(rows), "SmolLM2 solves some of them"
    assert result["accuracy"] == pytest.approx(sum(right.values()) / len(rows))
    for k in (1, 2, 4):
        chance = fmean(1 - comb(ROLLOUTS - c, k) / comb(ROLLOUTS, k) for c in right.values())
        assert result["pass_at"][str(k)] == pytest.approx(chance)
    assert result["num_voted"] == PROMPTS
    assert set(result["maj_at"]) == {"1", "2", "4"}
    assert result["maj_at"]["1"] == pytest.approx(result["accuracy"])
