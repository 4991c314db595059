"""`python benchmarks/suite.py`, as `plait bench` runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import suite
from report import BEGIN, END

MODULE = """
import time

def measure(session):
    session.count("tokens", 7, unit="tokens")
    {rest}
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(f"# Title\n{BEGIN}\n{END}\n")
    return path


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`benchmark("code")` is the only one there is, and ends with that code."""

    def make(rest: str) -> None:
        (tmp_path / "b99_trial.py").write_text(MODULE.format(rest=rest))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(suite, "LOGS", tmp_path / "logs")
        monkeypatch.setattr(suite, "GRACE", 2.0)
        only = {"B99": suite.Benchmark("b99_trial", "a trial", 3.0)}
        monkeypatch.setattr(suite, "BENCHMARKS", only)

    return make


def test_what_a_benchmark_found_is_on_the_page(benchmark: Any, page: Path) -> None:
    benchmark("pass")
    assert suite.main(["trial", "--out", str(page)]) == 0
    assert "| B99 | tokens | 7.000 tokens |" in page.read_text()
    stored = json.loads(page.with_suffix(".json").read_text())["B99"]
    assert stored["command"] == f"plait bench trial --out {page}"
    assert stored["versions"]["torch"]


def test_what_was_found_before_an_error_is_kept(benchmark: Any, page: Path) -> None:
    benchmark("raise RuntimeError('no more')")
    assert suite.main(["all", "--out", str(page)]) == 1
    text = page.read_text()
    assert "| B99 | tokens | 7.000 tokens |" in text
    assert "* B99 the rest: see " in text
    assert "no more" in (suite.LOGS / "B99.log").read_text()


def test_one_that_takes_too_long_is_ended(benchmark: Any, page: Path) -> None:
    benchmark("time.sleep(60)")
    assert suite.main(["all", "--out", str(page)]) == 1
    assert "* B99 the rest: not done after 5 s." in page.read_text()


def test_a_trial_is_not_stored(benchmark: Any, page: Path) -> None:
    benchmark("pass")
    before = page.read_text()
    assert suite.main(["all", "--quick", "--out", str(page)]) == 0
    assert page.read_text() == before
    assert not page.with_suffix(".json").exists()


def test_bad_arguments_are_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "page.md"
    empty.write_text("# Title\n")
    for arguments, message in (
        (["B99"], "no benchmark 'b99'"),
        (["all", "--out", str(empty)], "has no lines"),
        (["all", "--out", str(tmp_path / "none.md")], "No such file"),
    ):
        with pytest.raises(SystemExit) as ended:
            suite.main(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
