"""What a user has who submits a job: a folder with a recipe, a reward file and rows; and what became of the job."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

from ray_head import RayHead

from end_to_end.command_line import read_lines, tiny_recipe, write_recipe

SUBMIT = ("ray", "job", "submit", "--working-dir", ".")
GRACE = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})


def make_job_folder(
    folder: Path, model: Path, steps: int, *, reward_seconds: float = 0.0, **sections
) -> Path:
    """A step has six samples and two scoring processes, so it lasts for three times `reward_seconds` or longer."""
    folder.mkdir()
    sums = [(f"{i} + {j} =", str(i + j)) for i in range(6) for j in range(5)]
    rows = [{"prompt": q, "answer": a, "demonstration": a} for q, a in sums]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_rewards.py").write_text(
        "import time\n\n\ndef parity(prompt, completion):\n"
        f"    time.sleep({reward_seconds})\n    return float(len(completion) % 2)\n"
    )
    recipe = tiny_recipe(
        model,
        reward={"function": "my_rewards:parity", "gold_samples": 0},
        loop={"steps": steps, "prompts_per_step": 2},
        eval={"num_prompts": 0},
        **sections,
    )
    write_recipe(folder, "recipe.yaml", recipe)
    return folder


def start(head: RayHead, folder: Path, *command: str) -> str:
    """Submit and do not wait; the job's id."""
    done = head.run(*SUBMIT, "--no-wait", "--runtime-env-json", GRACE, "--", *command, cwd=folder)
    assert done.returncode == 0, done.stdout
    found = re.search(r"raysubmit_\w+", done.stdout)
    assert found is not None, done.stdout
    return found[0]


def ended(head: RayHead, job: str, seconds: float = 200) -> tuple[str, int | None, str]:
    """Status, exit code and log of a job, once it has ended."""

    def is_over() -> bool:
        return details(head, job)["status"] in ("SUCCEEDED", "FAILED", "STOPPED")

    wait_for(is_over, seconds, lambda: log_of(head, job))
    found = details(head, job)
    return found["status"], found["driver_exit_code"], log_of(head, job)


def details(head: RayHead, job: str) -> dict:
    return head.get(f"/api/jobs/{job}")


def log_of(head: RayHead, job: str) -> str:
    return head.get(f"/api/jobs/{job}/logs")["logs"]


def trained_steps(run: Path) -> list[int]:
    if not (run / "metrics.jsonl").is_file():
        return []
    return [row["step"] for row in read_lines(run / "metrics.jsonl") if "reward/mean" in row]


def wait_for(
    condition: Callable[[], object], seconds: float, said: Callable[[], str] = lambda: ""
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s; {said()}"
        time.sleep(0.1)
