"""One row of any data set -> one `Record`: validated text, nothing tokenized.

Reading is light (no tokenizer, no torch), so that the command line refuses a bad file within a
second. Where the rows come from is in `readers.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from ..engine.errors import ConfigError, Problem
from ..engine.types import TOKEN_COLUMNS
from .bad_rows import BadRows
from .config import Columns, TableSection, WordsSection
from .rows import (
    CONTRADICTORY,
    EMPTY,
    MAX_DETAIL,
    MISSING,
    NOT_TEXT,
    WRONG_TYPE,
    RowError,
)

MAX_ID = 500
TOO_LONG_ID = f"id longer than {MAX_ID} characters"
CALLS = ("tool_calls", "function_call")
"""Keys of a message that say something beside its content."""
ROLES = ("system", "developer", "user", "assistant", "tool")

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Record:
    """One problem in words; templates and the system prompt are already applied.

    >>> Record("sums.jsonl/1", ({"role": "user", "content": "2+2?"},), answer="4").demonstrations
    ()
    """

    prompt_id: str
    messages: tuple[Message, ...]
    answer: str | None = None
    demonstrations: tuple[str, ...] = ()
    reward: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    scores: tuple[float | None, ...] = ()
    """One for each demonstration, or none at all."""
    rejected: tuple[str, ...] = ()
    columns: Mapping[str, tuple[tuple[float, ...] | None, ...]] = field(default_factory=dict)
    """By name, the numbers of each demonstration's tokens; None for a demonstration without them."""
    difficulty: float | None = None
    part: str = ""
    """Name of the part of a mixture."""


@dataclass(frozen=True, slots=True)
class Part:
    """Records of a mixture that are drawn by one weight; they lie together."""

    name: str
    weight: float
    num_train: int


@dataclass(frozen=True, slots=True)
class Records:
    """A data set after the split: no training problem has the text of a held-out one.

    The sequences may read each record anew from disk: go through them once rather than often, and hold on to nothing.
    """

    train: Sequence[Record]
    held_out: Sequence[Record]
    copies: Sequence[Record] = ()
    """Training problems left out because their text equals a held-out one."""
    parts: tuple[Part, ...] = ()
    """Of a mixture, in the order of `train`; () where there is one data set."""
    bad: tuple[BadRows, ...] = ()
    """Rows that cannot be read and were dropped, by data set."""
    rewards: frozenset[str] = frozenset()
    """Names of rewards that training records bring along."""


class RowParser:
    """Maps the columns of a JSONL or Hugging Face row to a Record."""

    def __init__(self, config: TableSection, source: str) -> None:
        check_templates(config)
        self._config = config
        self._columns = config.columns
        self._source = source
        self._present: set[str] = set()

    def parse(self, row: object, number: int) -> Record:
        """Raises RowError naming the column."""
        if not isinstance(row, dict):
            raise RowError(WRONG_TYPE, f"a row must be an object, not {_kind(row)}")
        columns = self._columns
        row = with_nested(row, columns)
        self._present.update(row)
        messages, reply = self._messages(row)
        answer = _answer(row.get(columns.answer), columns.answer)
        texts = _texts(row.get(columns.demonstration), columns.demonstration)
        if reply is not None and texts:
            raise RowError(
                CONTRADICTORY,
                f"both {columns.demonstration!r} and a last assistant message: keep one of them",
            )
        if reply is not None:
            texts = (reply,)
        scores = _scores(
            row.get(columns.demonstration_score), columns.demonstration_score, len(texts)
        )
        record = Record(
            prompt_id=self._id(row.get(columns.id), number),
            messages=with_system_prompt(messages, self._config),
            answer=answer,
            demonstrations=tuple(write_demonstration(t, answer, self._config) for t in texts),
            rejected=_texts(row.get(columns.rejected), columns.rejected),
            scores=scores,
            columns=self._token_columns(row, len(texts)),
            reward=_optional_text(row.get(columns.reward), columns.reward),
            metadata=_metadata(row.get(columns.metadata), columns.metadata),
            origin=self._source,
            difficulty=_difficulty(row.get(columns.difficulty)),
        )
        check_encodable(record)
        return record

    def check_columns(self) -> None:
        """A column that the recipe names but no row has is a typing error, not an absent value."""
        shown = ", ".join(sorted(self._present))
        shown = shown if len(shown) <= MAX_DETAIL else f"{shown[:MAX_DETAIL]}..."
        missing = [
            Problem(
                f"data.columns.{name}",
                getattr(self._columns, name),
                f"no row of {self._source} has it; columns: {shown}",
            )
            for name in Columns.model_fields
            if getattr(self._columns, name) != Columns.model_fields[name].default
            and getattr(self._columns, name) not in self._present
        ]
        if missing:
            raise ConfigError(missing)

    def _messages(self, row: Mapping[str, Any]) -> tuple[tuple[Message, ...], str | None]:
        """The conversation, and the assistant's reply where the conversation ends with it."""
        columns = self._columns
        if row.get(columns.messages) is not None:
            messages = _conversation(row[columns.messages], columns.messages)
            reply = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
            messages = messages if reply is None else messages[:-1]
            if not any(message["role"] == "user" for message in messages):
                raise RowError(
                    CONTRADICTORY, f"{columns.messages!r} has no user message before the reply"
                )
            return wrap_prompt(messages, self._config), reply
        if columns.prompt not in row:
            raise RowError(MISSING, f"no column {columns.prompt!r} or {columns.messages!r}")
        text = _text(row[columns.prompt], columns.prompt)
        return wrap_prompt(({"role": "user", "content": text},), self._config), None

    def _token_columns(
        self, row: Mapping[str, Any], num: int
    ) -> Mapping[str, tuple[tuple[float, ...] | None, ...]]:
        """Numbers for each token of `num` demonstrations; how many each must have is known after tokenizing."""
        found = {}
        for name in TOKEN_COLUMNS:
            column = getattr(self._columns, name)
            if row.get(column) is not None:
                found[name] = _number_lists(row[column], column, num)
        return found

    def _id(self, value: object, number: int) -> str:
        column = self._columns.id
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise RowError(
                WRONG_TYPE, f"{column!r} must be a text or an integer, not {_kind(value)}"
            )
        prompt_id = f"{self._source}/{number}" if value is None else str(value)
        if not prompt_id.strip():
            raise RowError(EMPTY, f"{column!r} is empty")
        if len(prompt_id) > MAX_ID:
            raise RowError(TOO_LONG_ID, f"{column!r} has {len(prompt_id):,} characters")
        return prompt_id


def with_nested(row: Mapping[str, Any], columns: Columns) -> Mapping[str, Any]:
    """The row, and what dotted columns name inside its cells.

    >>> with_nested({"target": [{"content": "4"}]}, Columns(demonstration="target.0.content"))["target.0.content"]
    '4'
    """
    found: dict[str, Any] = {}
    for path in (getattr(columns, name) for name in Columns.model_fields):
        if path in row or "." not in path:
            continue
        value: Any = row
        for key in path.split("."):
            if isinstance(value, Mapping):
                value = value.get(key)
            elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
                value = value[int(key)]
            else:
                value = None
        if value is not None:
            found[path] = value
    return {**row, **found} if found else row


def check_templates(config: WordsSection) -> None:
    """Raises ConfigError where a template has no place for its text."""
    problems = []
    if "{prompt}" not in config.prompt_template:
        problems.append(
            Problem("data.prompt_template", config.prompt_template, "must contain {prompt}")
        )
    if not re.search(r"\{(demonstration|answer)\}", config.demonstration_template):
        problems.append(
            Problem(
                "data.demonstration_template",
                config.demonstration_template,
                "must contain {demonstration} or {answer}",
            )
        )
    if problems:
        raise ConfigError(problems)


def wrap_prompt(messages: Sequence[Message], config: WordsSection) -> tuple[Message, ...]:
    """The prompt template around the last user message."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    wrapped = config.prompt_template.replace("{prompt}", messages[last]["content"])
    return (*messages[:last], {"role": "user", "content": wrapped}, *messages[last + 1 :])


def with_system_prompt(messages: tuple[Message, ...], config: WordsSection) -> tuple[Message, ...]:
    """The configured system prompt first, unless the row brings its own."""
    if config.system_prompt is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return ({"role": "system", "content": config.system_prompt}, *messages)


def write_demonstration(text: str, answer: str | None, config: WordsSection) -> str:
    """The demonstration template around one text; raises RowError where it lacks the answer."""
    template = config.demonstration_template
    if answer is None and "{answer}" in template:
        raise RowError(
            CONTRADICTORY, "data.demonstration_template uses {answer}, but the row has none"
        )
    values = {"{demonstration}": text, "{answer}": answer or ""}
    # One pass: braces inside the texts, such as \boxed{answer}, are never substituted.
    return re.sub(r"\{(?:demonstration|answer)\}", lambda match: values[match[0]], template)


def check_encodable(record: Record) -> None:
    """Raises RowError for what neither a tokenizer nor a log file can take."""
    texts = [record.prompt_id, record.answer or "", record.reward or ""]
    texts += [*record.demonstrations, *record.rejected]
    texts += [message["content"] for message in record.messages]
    try:
        metadata = json.dumps(record.metadata, ensure_ascii=False)
        "".join([*texts, metadata]).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise RowError(
            NOT_TEXT, f"holds the lone surrogate U+{code:04X}, which is not text"
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(WRONG_TYPE, f"metadata cannot be written as JSON: {error}") from error


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise RowError(WRONG_TYPE, f"{column!r} must be a text, not {_kind(value)}")
    if not value.strip():
        raise RowError(EMPTY, f"{column!r} is empty")
    return value


def _optional_text(value: object, column: str) -> str | None:
    return None if value is None else _text(value, column)


def _answer(value: object, column: str) -> str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return _optional_text(value, column)


def _texts(value: object, column: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(_text(item, column) for item in values)


def _scores(value: object, column: str, num: int) -> tuple[float | None, ...]:
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if len(values) != num:
        raise RowError(
            CONTRADICTORY, f"{column!r} has {len(values)} numbers for {num} demonstrations"
        )
    return tuple(None if item is None else _number(item, column) for item in values)


def _number_lists(value: object, column: str, num: int) -> tuple[tuple[float, ...] | None, ...]:
    """One list of numbers (or None) for each of `num` texts; a flat list belongs to the only text."""
    if not isinstance(value, list):
        raise RowError(WRONG_TYPE, f"{column!r} must be a list of numbers, not {_kind(value)}")
    lists = value if any(isinstance(item, list) for item in value) else [value]
    if len(lists) != num:
        raise RowError(
            CONTRADICTORY, f"{column!r} has {len(lists)} lists of numbers for {num} demonstrations"
        )
    for item in lists:
        if not isinstance(item, list | None):
            raise RowError(
                WRONG_TYPE,
                f"{column!r} must hold one list of numbers a demonstration, not {_kind(item)}",
            )
    return tuple(
        None if item is None else tuple(_number(n, column) for n in item) for item in lists
    )


def _difficulty(value: object) -> float | None:
    """Data sets also use the name for words (`hard`), which have no order."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        return None
    return float(value)


def _number(value: object, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(WRONG_TYPE, f"{column!r} must hold numbers, not {_kind(value)}")
    if not isfinite(value):
        raise RowError(WRONG_TYPE, f"{column!r} holds {value}, which is not a finite number")
    return float(value)


def _metadata(value: object, column: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RowError(WRONG_TYPE, f"{column!r} must be an object, not {_kind(value)}")
    return value


def _conversation(value: object, column: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RowError(
            WRONG_TYPE, f"{column!r} must be a list of {{role, content}}, not {_kind(value)}"
        )
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise RowError(WRONG_TYPE, f"{column}[{i}] must be an object, not {_kind(message)}")
        role = message.get("role")
        if role not in ROLES:
            raise RowError(
                WRONG_TYPE, f"{column}[{i}].role = {role!r}: choose one of {', '.join(ROLES)}"
            )
        for key in CALLS:
            if message.get(key):
                raise RowError(
                    CONTRADICTORY,
                    f"{column}[{i}].{key} is not shown to the model: write the call into the content",
                )
        messages.append(
            {"role": role, "content": _text(message.get("content"), f"{column}[{i}].content")}
        )
    return tuple(messages)
