"""What is known of the training records that can be used: a few numbers of each, found in one pass over all."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from ..engine.errors import DataError
from .admission import TrainRow
from .data_report import Ledger
from .encoder import Encoder, why_unusable
from .quarantine import shorten
from .records import Part, Record, Records
from .rows import MAX_DETAIL
from .split import text_key


class Usable:
    """Numbers kept of the training records that can be used, in order; `[k]` is of the k-th."""

    def __init__(self, records: Sequence[Record], encoder: Encoder, ledger: Ledger) -> None:
        digest = _Digest()
        index, keys = array("q"), array("Q")
        demonstrated, paired, difficulty = array("b"), array("b"), array("d")
        for i, record, row in usable(records, encoder, ledger):
            prompt = row.prompt
            index.append(i)
            keys.append(text_key(record.prompt_id))
            demonstrated.append(bool(prompt.demonstrations))
            paired.append(bool(prompt.demonstrations and prompt.rejected))
            difficulty.append(np.nan if record.difficulty is None else record.difficulty)
            digest.add(record)
        self._key_order: np.ndarray | None = None
        self.index = np.array(index, np.int64)
        """Its number in the records."""
        self.keys = np.array(keys, np.uint64)
        """`text_key` of its prompt id."""
        self.demonstrated = np.array(demonstrated, bool)
        self.paired = np.array(paired, bool)
        """With a demonstration and a rejected response."""
        self.difficulty = np.array(difficulty)
        """NaN where the data has none."""
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.index)

    def find(self, key: int) -> np.ndarray:
        """Rows whose prompt id has this key; nearly always one or none."""
        if self._key_order is None:
            self._key_order = np.argsort(self.keys, kind="stable")
        ends = (
            np.searchsorted(self.keys, np.uint64(key), side=side, sorter=self._key_order)
            for side in ("left", "right")
        )
        return self._key_order[slice(*ends)]

    def leave_out(self, rows: np.ndarray, names: Collection[str]) -> None:
        """Remove rows, whose prompt ids are `names`."""
        self.index, self.keys = np.delete(self.index, rows), np.delete(self.keys, rows)
        self.demonstrated = np.delete(self.demonstrated, rows)
        self.paired = np.delete(self.paired, rows)
        self.difficulty = np.delete(self.difficulty, rows)
        self._key_order = None
        if names:
            content = json.dumps([self.digest, sorted(names)])
            self.digest = hashlib.sha256(content.encode()).hexdigest()


def usable(
    records: Sequence[Record], encoder: Encoder, ledger: Ledger
) -> Iterator[tuple[int, Record, TrainRow]]:
    """Number, record and tokenized row of those that can be used; the ledger counts the others."""
    for i, record in enumerate(records):
        try:
            row = encoder.encode(record, ledger)
        except DataError as error:
            ledger.drop(records, i, why_unusable(error), shorten(str(error), MAX_DETAIL))
        else:
            yield i, record, row


def parts_of(records: Records, kept: Usable) -> list[tuple[Part, np.ndarray]]:
    """Each part with its usable rows; one nameless part where the data is no mixture."""
    parts = records.parts or (Part("", 1.0, len(records.train)),)
    ends = np.cumsum([part.num_train for part in parts])
    places = np.searchsorted(kept.index, ends)
    rows = np.split(np.arange(len(kept.index)), places[:-1])
    return list(zip(parts, rows, strict=True))


class _Digest:
    """sha256 of everything that training reads of the records, in order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, record: Record) -> None:
        fields = [
            record.prompt_id,
            [dict(message) for message in record.messages],
            record.answer,
            record.demonstrations,
            record.rejected,
            record.reward,
            record.metadata,
            record.scores,
            record.columns,
            record.difficulty,
        ]
        self._digest.update(json.dumps(fields).encode() + b"\n")

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
