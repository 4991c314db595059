"""Memory of a JSONL data set that is read by number: `python tests/data/measure_streaming.py ROWS`.

Writes ROWS rows of about 300 bytes to a temporary folder, loads them with the tiny tokenizer, takes a hundred steps of
64 prompts, and prints one JSON object: bytes of the file, seconds, and resident memory in bytes before loading, at its
peak, and after the steps.
"""

import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from plait.rollouts.config import JsonlData
from plait.rollouts.data import load_data
from tiny_model import make_tiny_tokenizer

STEPS, PROMPTS = 100, 64
FILLER = "one two three four five six seven eight nine ten " * 4


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def write_rows(path: Path, rows: int) -> None:
    with path.open("w") as file:
        for i in range(rows):
            row = {"prompt": f"{FILLER}{i} + 1 =", "answer": str(i + 1), "demonstration": str(i)}
            file.write(json.dumps(row) + "\n")


def load(path: Path, tokenizer: Any) -> Any:
    config = JsonlData(type="jsonl", path=str(path))
    return load_data(config, tokenizer, num_eval=100, max_prompt_length=400, max_response_length=64)


def measure(rows: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tiny_tokenizer(folder)
        warm, path = Path(folder) / "warm.jsonl", Path(folder) / "rows.jsonl"
        write_rows(warm, 200)
        load(warm, tokenizer).take(PROMPTS)
        write_rows(path, rows)
        gc.collect()
        before, started = memory("VmRSS"), time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        data = load(path, tokenizer)
        seconds, started = time.perf_counter() - started, time.perf_counter()
        for _ in range(STEPS):
            data.take(PROMPTS)
        taken = (time.perf_counter() - started) / STEPS
        assert data.find("rows.jsonl/7").answer == "7" or data.report.held_out
        return {
            "rows": rows,
            "file_bytes": path.stat().st_size,
            "load_seconds": round(seconds, 1),
            "seconds_a_step": round(taken, 4),
            "before_bytes": before,
            "peak_bytes": memory("VmHWM"),
            "after_bytes": memory("VmRSS"),
        }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
