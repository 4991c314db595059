"""`plait bench` from names to the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import suite
from figures import Figure, Interval, at_least
from plait.engine.errors import ConfigError
from plait.launch import bench
from report import BEGIN, END, load, section, show, store, write_page


def result(name: str, *figures: Figure) -> dict[str, Any]:
    return {
        "title": name,
        "command": "plait bench all",
        "date": "2026-01-01 00:00",
        "seconds": 3,
        "budget": 60.0,
        "machine": "a machine",
        "versions": {"torch": "2"},
        "commit": "abc",
        "figures": [figure.to_json() for figure in figures],
    }


RESULTS = {
    "B3": result(
        "rollouts",
        Figure("batch", Interval(0.98, 0.97, 0.99), at_least(0.97), values=(0.98,) * 12),
        Figure("streamed", Interval(0.9, 0.89, 0.91), at_least(0.93), note="slow"),
    ),
    "B12": result("rewards", Figure("p99", None, void="the machine was busy")),
}


def test_the_page_holds_every_figure_and_keeps_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe end.\n")
    store(page, RESULTS)
    write_page(page)
    text = page.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith(f"{END}\n\nThe end.\n")
    assert "old" not in text
    assert "| B3 | batch | 0.980 | [0.970, 0.990] | >= 0.97 | met | 12 | - | - |" in text
    assert "| B3 | streamed | 0.900 | [0.890, 0.910] | >= 0.93 | not met |" in text
    assert "* B3 streamed: slow." in text
    assert "* B12 p99: the machine was busy." in text
    assert "1 met, 1 not met, 1 void" in text
    assert "Measured on a machine; torch 2; commit abc: B3 (2026-01-01 00:00" in text
    assert load(page) == json.loads((tmp_path / "benchmarks.json").read_text())


def test_a_page_without_a_place_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text("# Title\n")
    store(page, RESULTS)
    with pytest.raises(ValueError, match="has no lines"):
        write_page(page)


def test_the_table_shows_verdicts_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    show(RESULTS)
    out = capsys.readouterr().out
    for text in (
        "0.98",
        "[0.970, 0.990]",
        "not met",
        "B12 p99: the machine was busy",
        "3 s of 60 s",
    ):
        assert text in out


def test_names_and_modules() -> None:
    assert suite.chosen("all") == list(suite.BENCHMARKS)
    assert suite.chosen("b12,packing") == ["B12", "B6"]
    with pytest.raises(ValueError, match="no benchmark 'b99'"):
        suite.chosen("b99")


def test_every_benchmark_has_a_module_and_all_fit_an_hour() -> None:
    folder = Path(suite.__file__).parent
    assert {one.module for one in suite.BENCHMARKS.values()} == {
        path.stem for path in folder.glob("b[0-9]*.py")
    }
    assert sum(one.seconds for one in suite.BENCHMARKS.values()) <= 3600


def test_an_installed_package_says_that_it_needs_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "BENCHMARKS", tmp_path / "benchmarks")
    with pytest.raises(ConfigError, match="clone plait's repository"):
        bench.bench(["all"])


def test_section_of_nothing_is_no_error() -> None:
    assert section({}, "benchmarks.json").startswith("0 met")
