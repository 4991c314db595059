"""Commands and options that README and docs name are those that there are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from plait.launch.cli import app

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.*"))]
PAGES = [file for file in FILES if file.suffix in (".md", ".yaml", ".sh")]
COMMAND = re.compile(r"(?:^|[\s`])plait ((?:check )?[a-z]+)\b(.*)")


def options_of(command: Any) -> set[str]:
    return {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}


def commands() -> dict[str, set[str]]:
    found = {}
    for name, command in typer.main.get_command(app).commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        for inner, one in getattr(command, "commands", {"": command}).items():
            found[f"{name} {inner}".strip()] = options_of(one)
    return found


def code_of(text: str) -> Iterator[str]:
    """Spans between backticks, indented lines and those of fences."""
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        yield from [line] if fenced or line.startswith("    ") else re.findall(r"`([^`]+)`", line)


KNOWN = commands()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_exist(page: Path) -> None:
    text = page.read_text()
    for code in code_of(text) if page.suffix == ".md" else text.splitlines():
        for command, rest in COMMAND.findall(code.split("#")[0]):
            assert command in KNOWN, code
            given = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", rest))
            assert given <= KNOWN[command], code


def test_every_command_is_on_a_page() -> None:
    told = "".join(page.read_text() for page in PAGES)
    assert [name for name in KNOWN if f"plait {name}" not in told] == []
