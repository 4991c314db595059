"""Results as a table in the terminal, as JSON with all pairs, and as a section of a page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from figures import Figure
from figures import show as display
from plait.launch.console import wide_console

BEGIN, END = "<!-- table: plait bench -->", "<!-- end of table -->"
COLORS = {"met": "green", "not met": "red", "void": "yellow", "": ""}

Results = Mapping[str, Mapping[str, Any]]
"""Name of a benchmark -> what suite.run returned."""


def figures(result: Mapping[str, Any]) -> Iterator[Figure]:
    return map(Figure.from_json, result["figures"])


def show(results: Results) -> None:
    """Print the table, then why figures are void."""
    table = Table(title="plait bench")
    for column in ("", "figure", "measured", "95 % interval", "target", "", "n", "A/A", "CPU"):
        table.add_column(column, justify="right" if column in ("measured", "n") else "left")
    for name, result in results.items():
        for figure in figures(result):
            color = COLORS[figure.verdict]
            verdict = f"[{color}]{figure.verdict}[/]" if color else ""
            table.add_row(name, figure.name, *numbers(figure), verdict, *evidence(figure))
        table.add_section()
    console = wide_console()
    console.print(table)
    for name, result in results.items():
        for figure in figures(result):
            for text in filter(None, (figure.void, figure.note)):
                console.print(f"{name} {figure.name}: {text}", markup=False)
        console.print(f"{name} took {result['seconds']} s of {result['budget']:.0f} s")


def numbers(figure: Figure) -> tuple[str, str, str]:
    interval = "-" if figure.found is None else str(figure.found)
    return figure.measured, interval, str(figure.target or "-")


def evidence(figure: Figure) -> tuple[str, str, str]:
    """Pairs or repetitions, interval of the control, the ratio in CPU-seconds."""
    cpu = display(figure.cpu.median) if figure.cpu else "-"
    return str(len(figure.values)), str(figure.control or "-"), cpu


def summary(results: Results) -> str:
    verdicts = Counter(figure.verdict for one in results.values() for figure in figures(one))
    return ", ".join(f"{verdicts[name]} {name}" for name in ("met", "not met", "void"))


def store_of(page: Path) -> Path:
    """The JSON file beside a page."""
    return page.with_suffix(".json")


def load(page: Path) -> dict[str, Any]:
    path = store_of(page)
    return json.loads(path.read_text()) if path.is_file() else {}


def store(page: Path, results: Results) -> None:
    store_of(page).write_text(json.dumps(results, indent=1) + "\n")


def section(results: Results, data: str) -> str:
    """Markdown: one table, then what each benchmark was measured with."""
    lines = [
        f"{summary(results)}. Every pair is in [{data}]({data}).",
        "",
        "| | figure | measured | 95 % interval | target | | n | A/A | CPU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    remarks: list[str] = []
    for name, result in results.items():
        for figure in figures(result):
            cells = [name, figure.name, *numbers(figure), figure.verdict, *evidence(figure)]
            lines.append("| " + " | ".join(cells) + " |")
            said = "; ".join(filter(None, (figure.void, figure.note)))
            if said:
                remarks.append(f"* {name} {figure.name}: {said}.")
    lines += ["", *remarks, ""]
    origins: dict[str, list[str]] = {}
    for name, result in results.items():
        versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
        origin = f"{result['machine']}; {versions}; commit {result['commit']}"
        took = f"{name} ({result['date']}, {result['seconds']} s, `{result['command']}`)"
        origins.setdefault(origin, []).append(took)
    lines += [f"Measured on {origin}: {', '.join(names)}." for origin, names in origins.items()]
    return "\n".join(lines)


def divide(page: Path) -> tuple[str, str]:
    """What stands before and after the page's generated section. ValueError where it has no place for one."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no lines {BEGIN} and {END}")
    return before, after


def write_page(page: Path) -> None:
    """Replace the page's generated section by the stored results."""
    before, after = divide(page)
    text = section(load(page), store_of(page).name)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
