"""SmolLM2 teaches itself sums: killed and resumed, only verified traces, and CHORD trains on them."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

from math_verify import parse, verify

from end_to_end.command_line import plait, plait_command, read_lines, write_recipe
from end_to_end.test_smollm2 import recipe as smollm2_recipe
from end_to_end.test_train import wait_for

PROMPTS = 80
PROBE = ("algorithm.rollouts_per_prompt=4", "--rollouts-per-prompt", "4", "--max-prompts", "16")


def sums(**sections) -> dict:
    recipe = smollm2_recipe("chord")
    del recipe["data"]["demonstration_template"]
    recipe["data"]["demonstrations"] = "none"
    return {**recipe, **sections}


def test_teach_is_killed_resumed_and_chord_trains_on_its_traces(tmp_path: Path) -> None:
    write_recipe(tmp_path, "sums.yaml", sums(algorithm={"type": "grpo"}))
    command = ["teach", "sums.yaml", "--output", "traces", "--max-prompts", str(PROMPTS)]
    found, missed = (tmp_path / "traces" / f"{n}.jsonl" for n in ("demonstrations", "unsolved"))
    with (tmp_path / "first.log").open("w") as log:
        driver = subprocess.Popen(plait_command(*command), cwd=tmp_path, stdout=log, stderr=log)
        try:
            wait_for(
                lambda: (missed.exists() and missed.stat().st_size) or driver.poll() is not None,
                300,
            )
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
    before = (found.read_bytes(), missed.read_bytes())
    assert before[0], (tmp_path / "first.log").read_text()
    assert len(read_lines(found)) + len(read_lines(missed)) < PROMPTS, (
        "it was killed before its end"
    )

    done = plait(tmp_path, *command)
    assert f"{PROMPTS} prompts, 32 of them done before" in done.stdout
    assert found.read_bytes().startswith(before[0])
    assert missed.read_bytes().startswith(before[1])
    rows, others = read_lines(found), read_lines(missed)
    ids = [row["id"] for row in (*rows, *others)]
    assert len(ids) == len(set(ids)) == PROMPTS
    for row in rows:
        (text,) = row["demonstration"]
        assert verify(parse(row["answer"]), parse(text)), row
        (logprobs,) = row.get("behaviour_logprobs", [None])
        assert logprobs is None or all(value <= 0 for value in logprobs)
    assert sum("behaviour_logprobs" in row for row in rows) > len(rows) / 2

    probe_first_prompts(tmp_path)

    data = {"type": "jsonl", "path": "traces/demonstrations.jsonl"}
    write_recipe(tmp_path, "learn.yaml", sums(data=data))
    plait(tmp_path, "train", "learn.yaml", "loop.steps=2", "checkpoint.every=0")
    summary = json.loads((tmp_path / "runs" / "learn" / "summary.json").read_text())
    assert summary["tokens"]["expert"] > 0


def probe_first_prompts(folder: Path) -> None:
    """The same prompts and answers give the table that a run may read."""
    done = plait(folder, "probe", "sums.yaml", *PROBE, "--output", "probe", "--json")
    report = json.loads(done.stdout.splitlines()[-1])
    rows = read_lines(folder / "probe" / "rates.jsonl")
    assert len(rows) == report["prompts"] == sum(report["classes"].values()) == 16
    assert sum(row["right"] for row in rows) == report["right"] > 0
    assert 0 < report["signal_share"] <= 1
    read = ["data.probe=probe/rates.jsonl", "data.filter={solved_after: 1}"]
    plait(folder, "check", "recipe", "sums.yaml", *read)
