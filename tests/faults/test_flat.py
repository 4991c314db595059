"""F33: over 300 steps a warm run grows in nothing: memory, shared memory, descriptors, threads."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from end_to_end.command_line import no_verifier, plait_command, tiny_recipe, write_recipe

STEPS, WARM = 600, 300
"""The interpreter's table of interned strings, which imports fill, doubles once near step 230: 4 MB."""
MB = 2**20


@dataclass(frozen=True)
class Usage:
    """Sums over a process and everything it started."""

    step: int
    memory: float
    """Resident, in MB; what several share counts in each."""
    descriptors: int
    threads: int
    shared: float
    """Used of /dev/shm, in MB."""


def descendants(root: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found, new = {root}, {root}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return sorted(found)


def usage(root: int, step: int) -> Usage:
    memory, descriptors, threads = 0.0, 0, 0
    for pid in descendants(root):
        process = Path(f"/proc/{pid}")
        try:
            resident = int((process / "statm").read_text().split()[1])
            descriptors += len(os.listdir(process / "fd"))
            threads += len(os.listdir(process / "task"))
        except OSError:
            continue
        memory += resident * os.sysconf("SC_PAGE_SIZE") / MB
    disk = os.statvfs("/dev/shm")
    shared = (disk.f_blocks - disk.f_bfree) * disk.f_frsize / MB
    return Usage(step, memory, descriptors, threads, shared)


def slope(samples: list[Usage], name: str) -> float:
    """Per step; Theil and Sen's, which one odd sample does not move."""
    points = [(one.step, getattr(one, name)) for one in samples]
    slopes = [(y - b) / (x - a) for i, (a, b) in enumerate(points) for x, y in points[:i] if x != a]
    return float(np.median(slopes))


@pytest.mark.long
@pytest.mark.parametrize("staleness", [0, 1])
def test_f33_a_long_run_stays_flat(staleness, tiny_model, tmp_path, measured):
    rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1), "demonstration": "1"} for i in range(64)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "parity.py").write_text(
        "def grade(prompt, completion):\n    return float(len(completion) % 2)\n"
    )
    recipe = tiny_recipe(
        tiny_model,
        run={"name": "flat"},
        reward=no_verifier("parity:grade"),
        loop={"steps": STEPS, "prompts_per_step": 2, "staleness": staleness},
        eval={"num_prompts": 2},
        checkpoint={"every": 20},
    )
    recipe["algorithm"] |= {"rollouts_per_prompt": 2, "expert_rows_per_step": 1}
    recipe["algorithm"] |= {"sampler_ratio_cap": 2.0}
    path, metrics = (
        write_recipe(tmp_path, "flat.yaml", recipe),
        tmp_path / "runs/flat/metrics.jsonl",
    )
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            plait_command("train", path), cwd=tmp_path, stdout=log, stderr=log
        )
    samples: list[Usage] = []
    while process.poll() is None:
        time.sleep(0.1)
        step = len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0
        if step > WARM and (not samples or step > samples[-1].step):
            samples.append(usage(process.pid, step))
    assert process.returncode == 0, (tmp_path / "log").read_text()[-2000:]
    samples = [
        one for one in samples if one.step < STEPS
    ]  # the last step exports, and all is closed
    assert len(samples) > 20
    found = {name: slope(samples, name) for name in ("memory", "shared", "descriptors", "threads")}
    print(found, samples[0], samples[-1], sep="\n")
    assert found["memory"] <= 0.05
    assert found["shared"] <= 0.05
    assert abs(found["descriptors"]) < 1 / STEPS
    assert abs(found["threads"]) < 1 / STEPS
    measured(
        "F33",
        f"staleness {staleness}, steps {WARM} to {STEPS}: {found['memory']:+.3f} MB a step of "
        f"{samples[-1].memory:.0f} MB in all processes, object store {found['shared']:+.3f} MB, "
        "descriptors +0, threads +0",
    )
