"""`plait bench`: the benchmarks live in the checkout, beside the tests, and not in the installed package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ..engine.errors import ConfigError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def bench(arguments: list[str]) -> int:
    """Run benchmarks/suite.py with these arguments; its exit code. ConfigError where there is none."""
    suite = BENCHMARKS / "suite.py"
    if not suite.is_file():
        raise ConfigError.at(
            "bench",
            str(BENCHMARKS),
            "the installed package holds no benchmarks; clone plait's repository and run `plait bench` from there "
            "(make setup)",
        )
    return subprocess.run([sys.executable, str(suite), *arguments]).returncode
