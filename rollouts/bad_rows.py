"""Rows that cannot be read: refused all at once, or dropped, counted and listed in the quarantine file."""

from __future__ import annotations

from collections.abc import Iterator

from ..engine.errors import DataError
from .quarantine import MAX_TEXT, Quarantined
from .rows import JsonlLines, RowError, Rows

MAX_ERRORS_SHOWN = 20


class BadRows:
    """The bad rows of one data set: number, reason and detail of each."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._found: dict[int, tuple[str, str]] = {}

    def add(self, index: int, error: RowError) -> None:
        self._found[index] = (error.reason, str(error))

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        """(file and place, reason, detail) of each, in the order of the data."""
        for index, (reason, detail) in sorted(self._found.items()):
            yield f"{self._rows.name} {self._rows.where(index)}", reason, detail

    def raise_if_any(self, source: str) -> None:
        count = len(self)
        if not count:
            return
        lines = [f"{source}: {count} bad row{'s' * (count > 1)}"]
        for index, (_, detail) in sorted(self._found.items())[:MAX_ERRORS_SHOWN]:
            lines.append(f"  {self._rows.where(index)}: {detail}")
        if count > MAX_ERRORS_SHOWN:
            lines.append(f"  ... and {count - MAX_ERRORS_SHOWN} more")
        raise DataError("\n".join(lines))

    def quarantined(self) -> Iterator[Quarantined]:
        for index, (reason, detail) in sorted(self._found.items()):
            yield {
                "source": self._rows.name,
                "where": self._rows.where(index),
                "prompt_id": None,
                "reason": detail if detail.startswith(reason) else f"{reason}: {detail}",
                "row": self._read(index),
            }

    def _read(self, index: int) -> object:
        """The row, or the beginning of what is none."""
        try:
            return self._rows[index]
        except RowError:
            assert isinstance(self._rows, JsonlLines), "a table's rows can be read"
            return self._rows.head(index, MAX_TEXT)
