"""One record -> one `Prompt`: tokenized with the chat template, within the limits, every time it is taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..engine.errors import DataError
from ..engine.types import Demonstration, Prompt, Score
from .admission import TrainRow
from .chat import ChatFormat, ControlTokenError, PromptTooLongError
from .data_report import CONTROL_TOKEN, REFUSED, TOO_LONG, Ledger
from .pieces import Pieces
from .records import Record


class Encoder:
    """The tokenizer's way to write a record, and what of it cannot be written."""

    def __init__(self, chat: ChatFormat, max_prompt_length: int, max_response_length: int) -> None:
        self.chat = chat
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self._pieces = Pieces(chat.tokenizer)

    def encode(self, record: Record, ledger: Ledger | None = None) -> TrainRow:
        """Raises DataError where the prompt cannot be used; responses that cannot are left out."""
        ledger = ledger or Ledger()
        ids = self.chat.encode_prompt(record.messages, max_length=self.max_prompt_length)
        shown = dict(self._demonstrations(record, ids, ledger))
        refused = {i: text for i, text in enumerate(record.demonstrations) if i not in shown}
        prompt = Prompt(
            prompt_id=record.prompt_id,
            messages=record.messages,
            token_ids=tuple(ids),
            answer=record.answer,
            reward=record.reward,
            demonstrations=tuple(shown.values()),
            rejected=tuple(self._rejected(record, ids, ledger)),
            metadata=record.metadata,
            part=record.part,
            difficulty=record.difficulty,
        )
        return TrainRow(prompt, record.origin, tuple(shown), refused)

    def _demonstrations(
        self, record: Record, prompt: Sequence[int], ledger: Ledger
    ) -> Iterator[tuple[int, Demonstration]]:
        """Place in the row, and demonstration."""
        # Numbers for every token: then the text is encoded whole, however long it is.
        limit = None if record.columns else self.max_response_length
        for i, text in enumerate(record.demonstrations):
            try:
                ids = self.chat.encode_response(prompt, text, max_length=limit)
            except ControlTokenError:
                ledger.refused_demonstrations += 1
                continue
            ledger.long_demonstrations += len(ids) > self.max_response_length
            score = record.scores[i] if record.scores else None
            yield (
                i,
                Demonstration(
                    token_ids=tuple(ids),
                    text=text,
                    origin=record.origin,
                    columns=_columns(record, i, len(ids), ledger),
                    score=None if score is None else Score.ok(score),
                    piece_lengths=tuple(self._pieces.lengths(ids[:-1])),  # without the end token
                ),
            )

    def _rejected(
        self, record: Record, prompt: Sequence[int], ledger: Ledger
    ) -> Iterator[Demonstration]:
        for text in record.rejected:
            try:
                ids = self.chat.encode_response(prompt, text, max_length=self.max_response_length)
            except ControlTokenError:
                ledger.refused_rejected += 1
            else:
                yield Demonstration(token_ids=tuple(ids), text=text, origin=record.origin)


def why_unusable(error: DataError) -> str:
    """The reason that the report counts."""
    if isinstance(error, PromptTooLongError):
        return TOO_LONG
    return CONTROL_TOKEN if isinstance(error, ControlTokenError) else REFUSED


def _columns(
    record: Record, i: int, num_tokens: int, ledger: Ledger
) -> dict[str, tuple[float, ...]]:
    """Numbers of the tokens of demonstration i; a wrong count is put down in the ledger."""
    found = {}
    for name, lists in record.columns.items():
        values = lists[i]
        if values is None:
            continue
        if len(values) != num_tokens:
            ledger.wrong_columns.append(
                f"  {record.prompt_id}: {name} of demonstration {i} has {len(values)} numbers, "
                f"the demonstration {num_tokens} tokens"
            )
        found[name] = values
    return found
