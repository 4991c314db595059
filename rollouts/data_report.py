"""Where every row of the data went, and the ledger that counts it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from ..engine.errors import DataError
from .bad_rows import BadRows
from .quarantine import Quarantined, append
from .records import Record

TOO_LONG = "prompt longer than rollouts.max_prompt_length"
CONTROL_TOKEN = "control token in the prompt"
REFUSED = "refused by the chat template"
COPY = "equal to a held-out prompt"
IDS_SHOWN = 5


@dataclass(frozen=True)
class DataReport:
    """Where every row went: `rows == kept + held_out + sum(dropped.values())`."""

    rows: int
    kept: int
    """Training prompts."""
    held_out: int
    with_demonstration: int
    """Training prompts of the expert stream."""
    dropped: Mapping[str, int]
    """Rows by reason."""
    first_dropped: Mapping[str, Sequence[str]]
    """The first ids by reason, with what was wrong."""
    long_demonstrations: int
    """Demonstrations of training prompts beyond max_response_length: kept, algorithms cut them."""
    refused_demonstrations: int
    """Demonstrations left out because they hold a control token; their prompts are kept."""
    with_pair: int = 0
    """Training prompts with a demonstration and a rejected response."""
    refused_rejected: int = 0
    """Rejected responses left out because they hold a control token."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """Training prompts by part of a mixture."""

    def __str__(self) -> str:
        lines = [
            f"{self.rows} rows: {self.kept} to train on ({self.with_demonstration} with a "
            f"demonstration), {self.held_out} held out, {sum(self.dropped.values())} dropped"
        ]
        if self.parts:
            shares = ", ".join(f"{name} {count}" for name, count in self.parts.items())
            lines.append(f"  to train on by part: {shares}")
        for reason, count in self.dropped.items():
            lines.append(f"  {count} {reason}: {'; '.join(self.first_dropped[reason])}")
        if self.long_demonstrations:
            lines.append(
                f"  {self.long_demonstrations} demonstrations exceed rollouts.max_response_length"
            )
        if self.refused_demonstrations:
            lines.append(f"  {self.refused_demonstrations} demonstrations hold a control token")
        if self.with_pair:
            lines.append(f"  {self.with_pair} of them with a rejected response")
        if self.refused_rejected:
            lines.append(f"  {self.refused_rejected} rejected responses hold a control token")
        return "\n".join(lines)


@dataclass
class Ledger:
    """What the report counts while rows are encoded."""

    dropped: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    long_demonstrations: int = 0
    refused_demonstrations: int = 0
    refused_rejected: int = 0
    wrong_columns: list[str] = field(default_factory=list)
    _bad: list[BadRows] = field(default_factory=list)
    _places: list[tuple[Sequence[Record], int, str]] = field(default_factory=list)
    """Where each dropped record is to be found again, and why it was dropped."""

    def drop_bad(self, bad: BadRows) -> None:
        """Rows that are no records."""
        self._bad.append(bad)
        for where, reason, detail in bad:
            self._count(reason, where, detail)

    def drop(self, records: Sequence[Record], index: int, reason: str, detail: str = "") -> None:
        self._places.append((records, index, f"{reason}: {detail}" if detail else reason))
        self._count(reason, records[index].prompt_id, detail)

    def write(self, quarantine: Path) -> None:
        """Put every dropped row into the quarantine file."""
        rows = chain(chain.from_iterable(bad.quarantined() for bad in self._bad), self._records())
        append(quarantine, rows)

    def _records(self) -> Iterator[Quarantined]:
        for records, index, reason in self._places:
            record = records[index]
            yield {
                "source": record.origin,
                "where": record.prompt_id,
                "prompt_id": record.prompt_id,
                "reason": reason,
                "row": {
                    "messages": record.messages,
                    "answer": record.answer,
                    "demonstrations": record.demonstrations,
                    "metadata": record.metadata,
                },
            }

    def refuse_wrong_columns(self) -> None:
        """Raises DataError: a column that was made with other tokens says nothing about ours."""
        wrong = self.wrong_columns
        if wrong:
            more = [f"  ... and {len(wrong) - IDS_SHOWN} more"] if len(wrong) > IDS_SHOWN else []
            raise DataError(
                "\n".join(
                    [
                        "columns of demonstrations need one number a token, the end token included:",
                        *wrong[:IDS_SHOWN],
                        *more,
                        "compute them on the ids of plait.rollouts.chat.ChatFormat(tokenizer).encode_response("
                        "prompt_ids, text) with this model's tokenizer (docs/expert-losses.md)",
                    ]
                )
            )

    def _count(self, reason: str, name: str, detail: str) -> None:
        self.dropped[reason] += 1
        shown = self.first.setdefault(reason, [])
        if len(shown) < IDS_SHOWN:
            shown.append(f"{name} ({detail})" if detail else name)
