"""Data sets larger than memory: of a row only a few numbers are held."""

import json
import subprocess
import sys
from pathlib import Path


def test_memory_grows_by_a_hundred_bytes_a_row() -> None:
    """Holding the rows themselves would take 100 MB more (2,600 bytes each); 30 MB are the tokenizer's and malloc's."""
    rows = 40_000
    script = Path(__file__).with_name("measure_streaming.py")
    done = subprocess.run(
        [sys.executable, str(script), str(rows)],
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["rows"] == rows
    assert found["peak_bytes"] - found["before_bytes"] < 100 * rows + 30e6, found
    assert found["after_bytes"] - found["before_bytes"] < 100 * rows + 30e6, found
