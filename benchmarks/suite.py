"""Run benchmarks, each in a process of its own, and show what they found: what `plait bench` calls.

    python benchmarks/suite.py all --out docs/benchmarks.md

Every module b*.py has `measure(session)`. What it prints is in build/bench/NAME.log. All of them together take less
than an hour on two cores.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from figures import Figure
from harness import Session
from machine import describe
from report import divide, load, show, store, write_page

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "bench"
GRACE = 120.0
"""Seconds beyond a benchmark's budget after which its processes are killed."""


@dataclass(frozen=True)
class Benchmark:
    module: str
    title: str
    seconds: float
    """What it is expected to take; its module divides them among its figures."""


BENCHMARKS = {
    "B1": Benchmark("b01_trl", "against TRL", 720),
    "B2": Benchmark("b02_learner", "learner efficiency", 240),
    "B3": Benchmark("b03_rollouts", "rollout efficiency", 320),
    "B4": Benchmark("b04_overlap", "overlap", 230),
    "B5": Benchmark("b05_orchestration", "orchestration", 220),
    "B6": Benchmark("b06_packing", "padding and balance", 70),
    "B7": Benchmark("b07_weight_sync", "weight sync", 270),
    "B8": Benchmark("b08_logit_memory", "logit memory", 180),
    "B9": Benchmark("b09_prefixes", "prefix reuse, price of being hybrid", 180),
    "B10": Benchmark("b10_tails", "tails", 90),
    "B11": Benchmark("b11_growth", "growth of cost", 260),
    "B12": Benchmark("b12_rewards", "rewards", 270),
    "B13": Benchmark("b13_start", "start, resume, checkpoint", 540),
}


def chosen(names: str) -> list[str]:
    """`all`, or names and modules separated by commas. ValueError names what is not known."""
    if names == "all":
        return list(BENCHMARKS)
    known = {name.lower(): name for name in BENCHMARKS}
    known |= {one.module.split("_", 1)[1]: name for name, one in BENCHMARKS.items()}
    found = []
    for name in names.lower().split(","):
        if name not in known:
            raise ValueError(f"no benchmark {name!r}; there are {', '.join(known)}, and all")
        found.append(known[name])
    return found


def environment() -> dict[str, str]:
    """Of a benchmark's process: one allocator for all sides, and what its Ray workers import."""
    from plait.launch.cluster import ALLOCATOR

    folders = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "src")]
    return {
        **os.environ,
        **ALLOCATOR,
        "PYTHONPATH": os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def run(name: str, *, quick: bool, command: str) -> dict[str, Any]:
    """One benchmark in a fresh process; what it found, or why it found nothing."""
    benchmark = BENCHMARKS[name]
    LOGS.mkdir(parents=True, exist_ok=True)
    result, log = LOGS / f"{name}.json", LOGS / f"{name}.log"
    result.unlink(missing_ok=True)
    child = [sys.executable, str(Path(__file__)), "--child", benchmark.module, str(result)]
    started = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            [*child, *(["--quick"] * quick)],
            stdout=out,
            stderr=out,
            env=environment(),
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            process.wait(benchmark.seconds + GRACE)
            problem = f"see {log}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            problem = f"not done after {benchmark.seconds + GRACE:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    figures = json.loads(result.read_text()) if result.is_file() else []
    if problem:
        figures.append(
            Figure("all of it" if not figures else "the rest", None, void=problem).to_json()
        )
    return {
        "title": benchmark.title,
        "command": command,
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "seconds": round(time.monotonic() - started),
        "budget": benchmark.seconds,
        **describe(),
        "figures": figures,
    }


def measure(module: str, result: Path, *, quick: bool) -> None:
    """In the benchmark's own process; every figure is written at once."""

    def keep(figures: Sequence[Figure]) -> None:
        result.write_text(json.dumps([figure.to_json() for figure in figures], indent=1))

    importlib.import_module(module).measure(Session(quick=quick, keep=keep))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="plait bench", description="Measure this checkout.")
    parser.add_argument("names", nargs="?", default="all", help="B3,B7 or rollouts,... or all")
    parser.add_argument(
        "--out", type=Path, help="page whose table is written, e.g. docs/benchmarks.md"
    )
    parser.add_argument(
        "--quick", action="store_true", help="see that the code works; no figure counts"
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        module, result = options.child
        measure(module, Path(result), quick=options.quick)
        return 0
    try:
        names = chosen(options.names)
        if options.out:
            divide(options.out)  # better now than after an hour
    except (ValueError, OSError) as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without what was started
    command = shlex.join(["plait", "bench", *arguments])
    found: dict[str, Mapping[str, Any]] = {}
    for name in names:
        seconds = BENCHMARKS[name].seconds
        print(f"{name} {BENCHMARKS[name].title}: up to {seconds / 60:.0f} min", flush=True)
        found[name] = run(name, quick=options.quick, command=command)
    show(found)
    if not options.quick:
        page = options.out or LOGS / "benchmarks.md"
        everything = load(page) | found
        store(page, {name: everything[name] for name in BENCHMARKS if name in everything})
        if options.out:
            write_page(page)
    void = [f for one in found.values() for f in one["figures"] if f["verdict"] == "void"]
    return 1 if void and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
