"""A run as a person starts it, its processes by role, and what it leaves behind."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import secrets
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from end_to_end.command_line import plait_command, read_lines, write_parity, write_recipe
from plait.engine import guard
from plait.engine.processes import is_alive

MARK = "PLAIT_TEST_MARK"
ROLES = {
    "rollout worker": b"ray::RolloutWorker",
    "vLLM engine": b"VLLM::EngineCore",
    "learner rank": b"ray::RemoteLearner",
}
SCORING = "scoring process"


class RealRun:
    """`plait train` in a folder of its own; temporary files of all its processes go to `tmp`."""

    def __init__(
        self,
        folder: Path,
        recipe: dict[str, Any],
        env: Mapping[str, str] | None = None,
        grade_seconds: float = 0.0,
    ):
        self.folder, self.mark = folder, secrets.token_hex(8)
        folder.mkdir(parents=True, exist_ok=True)
        self.tmp = Path(tempfile.mkdtemp(prefix="run-", dir="/tmp"))  # sockets need short paths
        rows = [
            {"prompt": f"{i} + {j} =", "answer": str(i + j), "demonstration": str(i + j)}
            for i in range(8)
            for j in range(8)
        ]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_parity(folder, grade_seconds)
        write_recipe(
            folder, "recipe.yaml", {**recipe, "run": {**recipe.get("run", {}), "name": "r"}}
        )
        self.run = folder / "runs" / "r"
        self.shared_memory = set(os.listdir("/dev/shm"))
        self.output = (folder / "output.txt").open("w")
        self.driver = subprocess.Popen(
            plait_command("train", "recipe.yaml"),
            cwd=folder,
            env={
                **os.environ,
                MARK: self.mark,
                "TMPDIR": str(self.tmp),
                "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}",
                **(env or {}),
            },
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    @property
    def said(self) -> str:
        return (self.folder / "output.txt").read_text()

    def rows(self) -> list[dict[str, Any]]:
        """Finished steps; the last line may be torn."""
        path = self.run / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_text().split("\n")[:-1]
        return [row for row in map(json.loads, lines) if "time/step" in row]

    def weights(self) -> dict[int, str]:
        """Digest after each step."""
        return {row["step"]: row["weights"] for row in read_lines(self.run / "steps.jsonl")}

    def processes(self) -> list[int]:
        """All that the run has started and that live, the driver itself included."""
        return [pid for pid in guard.marked(self.mark, MARK) if is_alive(pid)]

    def of_role(self, role: str) -> list[int]:
        found = []
        for pid in self.processes():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                scores = f"{guard.SCORING}=".encode() in Path(f"/proc/{pid}/environ").read_bytes()
            except OSError:
                continue  # it has ended meanwhile
            if scores if role == SCORING else command.startswith(ROLES[role]):
                found.append(pid)
        return found

    def wait_for_step(self, step: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not any(row["step"] >= step for row in self.rows()):
            assert self.driver.poll() is None, self.said
            assert time.monotonic() < deadline, f"no step {step} within {seconds} s: {self.said}"
            time.sleep(0.1)

    def leftovers(self, seconds: float) -> tuple[list[str], float]:
        """What is there after `seconds` of what the run has made, and when it was gone."""
        started = time.monotonic()
        while True:
            found = [*map(describe, self.processes()), *os.listdir(self.tmp)]
            found += set(os.listdir("/dev/shm")) - self.shared_memory - in_use()
            took = time.monotonic() - started
            if not found:
                self.tmp.rmdir()
            if not found or took > seconds:
                return found, took
            time.sleep(0.1)


def describe(pid: int) -> str:
    """Its number, state and command."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return f"{pid} {state} {command[:120]}"
    return f"{pid}, ended meanwhile"


def in_use() -> set[str]:
    """Names in /dev/shm that any living process has mapped: those that are asked for here belong to other programs."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or belongs to someone else
            found |= set(re.findall(r"/dev/shm/(\S+)", maps.read_text()))
    return found
