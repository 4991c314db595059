"""Raw rows by number, each read when it is asked for: a data set may be larger than memory."""

from __future__ import annotations

import json
import os
import weakref
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ..engine.errors import ConfigError, DataError

MAX_ROW_BYTES = 64 * 2**20
MAX_DETAIL = 300
"""Characters of an error text about one row."""

BROKEN = "broken JSON"
TOO_LARGE = f"row larger than {MAX_ROW_BYTES // 2**20} MiB"
NOT_TEXT = "not text"
MISSING = "missing column"
EMPTY = "empty text"
WRONG_TYPE = "wrong type"
DUPLICATE = "duplicate id"
CONTRADICTORY = "columns that do not fit together"


class RowError(ValueError):
    """What is wrong with one row: one of the reasons above, and the detail; the reader adds where it is."""

    def __init__(self, reason: str, detail: str) -> None:
        if len(detail) > MAX_DETAIL:
            detail = f"{detail[:MAX_DETAIL]}..."
        super().__init__(detail)
        self.reason = reason


class Rows(Protocol):
    """Rows of one file or data set; `rows[i]` takes O(1), whatever i."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> object:
        """The row as JSON; raises RowError where it is none."""
        ...

    def number(self, index: int) -> int:
        """What the row is called by: the line of a file, counted from 1, or the row of a table, from 0."""
        ...

    def where(self, index: int) -> str: ...


class JsonlLines:
    """One JSON object a line. Of a line, its number and the offset of its first byte are kept.

    Blank lines are ignored. The file must not change while it is in use: DataError says that it did.
    """

    def __init__(self, path: str, max_rows: int | None = None) -> None:
        self.name = Path(path).name
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ConfigError.at("data.path", path, f"cannot be read: {error.strerror}") from error
        weakref.finalize(self, os.close, self._file)
        self._stamp = self._read_stamp()
        self._offsets, self._numbers = array("Q"), array("Q")
        end = 0
        with open(path, "rb") as file:
            for number, (start, end, blank) in enumerate(_lines(file), start=1):
                if blank:
                    continue
                if len(self._offsets) == max_rows:
                    end = start
                    break
                self._offsets.append(start)
                self._numbers.append(number)
        self._offsets.append(end)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> object:
        size = self._size(index)
        if size > MAX_ROW_BYTES:
            raise RowError(TOO_LARGE, f"{size:,} bytes")
        return _parse_line(self._read(index, size), first=self._numbers[index] == 1)

    def number(self, index: int) -> int:
        return self._numbers[index]

    def where(self, index: int) -> str:
        return f"line {self._numbers[index]}"

    def head(self, index: int, size: int) -> str:
        """The beginning of a line that cannot be parsed."""
        found = self._read(index, min(size, self._size(index)))
        return found.decode(errors="backslashreplace").rstrip()

    def _size(self, index: int) -> int:
        return self._offsets[index + 1] - self._offsets[index]

    def _read(self, index: int, size: int) -> bytes:
        if self._read_stamp() != self._stamp:
            raise DataError(
                f"{self._path} was changed while it is in use: leave it alone, and resume the run or start a new one"
            )
        return os.pread(self._file, size, self._offsets[index])

    def _read_stamp(self) -> tuple[int, int]:
        stat = os.fstat(self._file)
        return stat.st_size, stat.st_mtime_ns


def _lines(file: Any) -> Iterator[tuple[int, int, bool]]:
    """Start, end and blankness of each line; one that is too large for a row is never held whole."""
    start = 0
    while line := file.readline(MAX_ROW_BYTES):
        end = start + len(line)
        blank = not line.strip(b" \t\r\n")
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_ROW_BYTES)
            end += len(line)
        yield start, end, blank
        start = end


def _parse_line(line: bytes, *, first: bool) -> object:
    try:
        text = line.rstrip().decode("utf-8-sig" if first else "utf-8")
        return json.loads(text, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RowError(NOT_TEXT, f"not UTF-8 (byte {error.start} of the line)") from error
    except RecursionError as error:
        raise RowError(BROKEN, "nested too deeply") from error
    except json.JSONDecodeError as error:
        raise RowError(BROKEN, f"broken JSON: {error.msg} (column {error.colno})") from error
    except ValueError as error:
        raise RowError(BROKEN, f"broken JSON: {error}") from error


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON value")


class TableRows:
    """Rows of a loaded Hugging Face data set, which Arrow maps from disk."""

    def __init__(self, table: Any, name: str, max_rows: int | None = None) -> None:
        self.name = name
        self._table = table
        self._count = len(table) if max_rows is None else min(max_rows, len(table))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> object:
        return self._table[index]

    def number(self, index: int) -> int:
        return index

    def where(self, index: int) -> str:
        return f"row {index}"
