"""Records + tokenizer -> the run's `Data`: two endless prompt streams and the held-out prompts.

Everything is tokenized once, at the start, because only then is it known which rows fit; ids are
kept as compact arrays, and `Prompt` objects are made when they are taken. The order is a function
of (data.seed, stream, position), so a position is all that a checkpoint must hold.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from ..engine.errors import DataError
from ..engine.types import Demonstration, Prompt, Score
from .admission import TrainRow
from .admission_policy import Key
from .chat import ChatFormat, ControlTokenError, PromptTooLongError
from .config import DataConfig
from .data_report import IDS_SHOWN, DataReport
from .hints import HintDisplay
from .order import ShuffledStream
from .pieces import Pieces
from .readers import read_records
from .records import Record, Records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOO_LONG = "prompt longer than rollouts.max_prompt_length"
CONTROL_TOKEN = "control token in the prompt"
REFUSED = "refused by the chat template"
COPY = "equal to a held-out prompt"


@dataclass(frozen=True, slots=True)
class _Response:
    """One demonstration, encoded."""

    place: int
    """Among the row's."""
    text: str
    ids: np.ndarray
    pieces: np.ndarray
    """Tokens of each piece."""
    columns: Mapping[str, np.ndarray]
    """Numbers of its tokens, by name."""
    score: Score | None

    def to_demonstration(self, origin: str) -> Demonstration:
        return Demonstration(
            token_ids=tuple(self.ids.tolist()),
            text=self.text,
            origin=origin,
            columns={name: tuple(values.tolist()) for name, values in self.columns.items()},
            score=self.score,
            piece_lengths=tuple(self.pieces.tolist()),
        )


@dataclass(frozen=True, slots=True)
class _Encoded:
    record: Record
    prompt: np.ndarray
    demonstrations: tuple[_Response, ...]
    rejected: tuple[_Response, ...]
    refused: tuple[int, ...] = ()
    """Places of demonstrations with a control token."""

    @property
    def paired(self) -> bool:
        return bool(self.demonstrations and self.rejected)

    def to_prompt(self) -> Prompt:
        record = self.record
        return Prompt(
            prompt_id=record.prompt_id,
            messages=record.messages,
            token_ids=tuple(self.prompt.tolist()),
            answer=record.answer,
            reward=record.reward,
            demonstrations=tuple(d.to_demonstration(record.origin) for d in self.demonstrations),
            rejected=tuple(r.to_demonstration(record.origin) for r in self.rejected),
            metadata=record.metadata,
        )

    def to_row(self) -> TrainRow:
        places = tuple(response.place for response in self.demonstrations)
        return TrainRow(self.to_prompt(), self.record.origin, places, self.refused)

    def admitted(self, dropped: Collection[Key], scores: Mapping[Key, Score]) -> _Encoded:
        name = self.record.prompt_id
        kept = (d for d in self.demonstrations if (name, d.place) not in dropped)
        scored = (replace(d, score=scores.get((name, d.place), d.score)) for d in kept)
        return replace(self, demonstrations=tuple(scored))


@dataclass
class _Ledger:
    """What the report counts while rows are encoded."""

    dropped: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    refused_demonstrations: int = 0
    refused_rejected: int = 0
    wrong_columns: list[str] = field(default_factory=list)

    def drop(self, reason: str, prompt_id: str, detail: object = "") -> None:
        self.dropped[reason] += 1
        shown = self.first.setdefault(reason, [])
        if len(shown) < IDS_SHOWN:
            shown.append(f"{prompt_id} ({detail})" if detail else prompt_id)


class Data:
    """Implements `engine.contracts.DataSource`."""

    eval_prompts: Sequence[Prompt]
    end_token_id: int
    """The token that ends a demonstration, and should end a sample."""
    show_hint: HintDisplay
    """A training prompt with the beginning of a solution in its user's turn."""

    def __init__(
        self,
        train: Sequence[_Encoded],
        eval_prompts: Sequence[Prompt],
        seed: int,
        report: DataReport,
        chat: ChatFormat,
        show_hint: HintDisplay,
    ) -> None:
        self.eval_prompts = eval_prompts
        self.end_token_id = chat.end_id
        self.show_hint = show_hint
        self._chat = chat
        self.report = report
        self._seed = seed
        self._order(train)

    def _order(self, train: Sequence[_Encoded]) -> None:
        seed = self._seed
        self._train = train
        self._rows: dict[str, int] = {}
        self._experts = [i for i, row in enumerate(train) if row.demonstrations]
        self._stream = ShuffledStream(len(train), seed=seed, name="prompts")
        self._expert_stream = ShuffledStream(len(self._experts), seed=seed, name="experts")
        self._fingerprint = {
            "data.seed": seed,
            "training prompts": _digest([row.record for row in train]),
            "prompts with a demonstration": len(self._experts),
        }

    def rows(self) -> Iterator[TrainRow]:
        """Every training prompt, in the order of the data; the streams do not move."""
        return (row.to_row() for row in self._train)

    def row(self, prompt_id: str) -> TrainRow:
        """One of them; raises DataError where there is none."""
        return self._train[self._find(prompt_id)].to_row()

    def admit(
        self, dropped: Collection[Key], left_out: Mapping[str, str], scores: Mapping[Key, Score]
    ) -> None:
        """Before the first `take`: remove demonstrations by place and prompts by id (with a reason), and store scores.

        Raises DataError where no training prompt is left.
        """
        kept = [
            row.admitted(dropped, scores)
            for row in self._train
            if row.record.prompt_id not in left_out
        ]
        counts = Counter(self.report.dropped)
        counts.update(left_out.values())
        first = {reason: list(shown) for reason, shown in self.report.first_dropped.items()}
        for prompt_id, reason in left_out.items():
            if len(shown := first.setdefault(reason, [])) < IDS_SHOWN:
                shown.append(prompt_id)
        self.report = replace(
            self.report,
            kept=len(kept),
            with_demonstration=sum(bool(row.demonstrations) for row in kept),
            with_pair=sum(row.paired for row in kept),
            dropped=dict(counts),
            first_dropped=first,
        )
        if not kept:
            raise DataError(f"no training prompt is left:\n{self.report}")
        self._order(kept)

    @property
    def num_prompts(self) -> int:
        return len(self._train)

    @property
    def num_experts(self) -> int:
        """Training prompts with at least one demonstration."""
        return len(self._experts)

    def take(self, n: int) -> Sequence[Prompt]:
        """The next n prompts, all different. Raises DataError where n is more than there are."""
        if n > self.num_prompts:
            raise DataError(
                f"a step asks for {n} different prompts, the training set has {self.num_prompts}: "
                "lower loop.prompts_per_step or add data"
            )
        return [self._train[row].to_prompt() for row in self._stream.take(n)]

    def take_experts(self, n: int) -> Sequence[Prompt]:
        """The next n prompts with a demonstration; raises DataError where there are not as many."""
        if n > self.num_experts:
            refused = self.report.refused_demonstrations
            raise DataError(
                f"a step asks for {n} different prompts with a demonstration, the training set has "
                f"{self.num_experts}"
                + (f" ({refused} demonstrations hold a control token)" if refused else "")
                + ": add demonstrations (data.columns.demonstration, data.demonstrations) or choose "
                "an algorithm that needs fewer"
            )
        rows = self._expert_stream.take(n) if n else []
        return [self._train[self._experts[row]].to_prompt() for row in rows]

    def peek(self, n: int) -> Sequence[Prompt]:
        """Some training prompts; the streams do not move."""
        return [row.to_prompt() for row in self._train[:n]]

    def find(self, prompt_id: str) -> Prompt:
        """A training prompt by its id; raises DataError where there is none."""
        return self._train[self._find(prompt_id)].to_prompt()

    def _find(self, prompt_id: str) -> int:
        if not self._rows:
            self._rows.update((row.record.prompt_id, i) for i, row in enumerate(self._train))
        if prompt_id not in self._rows:
            raise DataError(f"no training prompt has the id {prompt_id!r}")
        return self._rows[prompt_id]

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids of the tokenizer."""
        return len(self._chat.tokenizer)

    def pair_tokens(self, max_response_length: int) -> Mapping[str, int]:
        """Tokens of the rows that a pairwise expert loss compares, by prompt."""
        found = {}
        for row in self._train:
            if row.paired:
                responses = (row.demonstrations[0], *row.rejected)
                lengths = [min(len(r.ids), max_response_length) for r in responses]
                found[row.record.prompt_id] = sum(lengths) + len(lengths) * len(row.prompt)
        return found

    def empty_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """The chat template around one empty user turn, after the prompt's own system message where it has one."""
        system = [m for m in prompt.messages[:1] if m["role"] in ("system", "developer")]
        return tuple(self._chat.encode_prompt([*system, {"role": "user", "content": ""}]))

    def state_dict(self) -> dict[str, Any]:
        return {
            "prompts": self._stream.position,
            "experts": self._expert_stream.position,
            "fingerprint": dict(self._fingerprint),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises DataError where the state is none, or belongs to other data, and says what differs."""
        prompts, experts, saved = (state.get(k) for k in ("prompts", "experts", "fingerprint"))
        if not (_is_position(prompts) and _is_position(experts) and isinstance(saved, Mapping)):
            raise DataError(f"not a state of this data source: {dict(state)}")
        changed = [
            f"{name} (checkpoint: {saved.get(name)}, now: {value})"
            for name, value in self._fingerprint.items()
            if saved.get(name) != value
        ]
        if changed:
            raise DataError(
                "the data set differs from the checkpoint's: "
                + "; ".join(changed)
                + ". Restore it, "
                "or start a new run from the exported model"
            )
        self._stream.position, self._expert_stream.position = prompts, experts


def load_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_eval: int,
    max_prompt_length: int,
    max_response_length: int,
    records: Records | None = None,
) -> Data:
    """Read (unless `records` are given), tokenize and order a data set.

    Raises what `read_records` raises, and DataError where no training prompt, or no held-out prompt
    of those asked for, is left after dropping what cannot be used.
    """
    records = read_records(config, num_eval) if records is None else records
    chat = ChatFormat(tokenizer)
    ledger = _Ledger()
    for prompt_id in records.copies:
        ledger.drop(COPY, prompt_id)
    train = list(_encode(records.train, chat, max_prompt_length, max_response_length, ledger))
    held_out = list(_encode(records.held_out, chat, max_prompt_length, max_response_length, ledger))
    _refuse_wrong_columns(ledger)
    report = DataReport(
        rows=len(records.train) + len(records.held_out) + len(records.copies),
        kept=len(train),
        held_out=len(held_out),
        with_demonstration=sum(bool(row.demonstrations) for row in train),
        dropped=dict(ledger.dropped),
        first_dropped=ledger.first,
        long_demonstrations=sum(
            len(response.ids) > max_response_length
            for row in train
            for response in row.demonstrations
        ),
        refused_demonstrations=ledger.refused_demonstrations,
        with_pair=sum(row.paired for row in train),
        refused_rejected=ledger.refused_rejected,
    )
    if not train or (records.held_out and not held_out):
        kind = "training" if not train else "held-out"
        raise DataError(f"no {kind} prompt is left:\n{report}")
    eval_prompts = tuple(row.to_prompt() for row in held_out)
    show_hint = HintDisplay(chat, config.hint_template, max_prompt_length)
    return Data(train, eval_prompts, config.seed, report, chat, show_hint)


def _encode(
    records: Sequence[Record], chat: ChatFormat, max_prompt: int, max_response: int, ledger: _Ledger
) -> Iterable[_Encoded]:
    pieces = Pieces(chat.tokenizer)
    for record in records:
        try:
            prompt = chat.encode_prompt(record.messages, max_length=max_prompt)
        except PromptTooLongError as error:
            ledger.drop(TOO_LONG, record.prompt_id, error)
        except ControlTokenError as error:
            ledger.drop(CONTROL_TOKEN, record.prompt_id, error)
        except DataError as error:
            ledger.drop(REFUSED, record.prompt_id, error)
        else:
            responses, refused = [], []
            for i, text in enumerate(record.demonstrations):
                # Numbers for every token: then the text is encoded whole, however long it is.
                limit = None if record.columns else max_response
                try:
                    ids = chat.encode_response(prompt, text, max_length=limit)
                except ControlTokenError:
                    ledger.refused_demonstrations += 1
                    refused.append(i)
                else:
                    lengths = pieces.lengths(ids[:-1])  # without the end token
                    responses.append(
                        _Response(
                            i,
                            text,
                            np.array(ids, np.int32),
                            np.array(lengths, np.int32),
                            _columns(record, i, len(ids), ledger),
                            _score(record, i),
                        )
                    )
            rejected = tuple(_rejected(record, prompt, chat, max_response, ledger))
            ids = np.array(prompt, np.int32)
            yield _Encoded(record, ids, tuple(responses), rejected, tuple(refused))


def _rejected(
    record: Record, prompt: Sequence[int], chat: ChatFormat, max_response: int, ledger: _Ledger
) -> Iterable[_Response]:
    for i, text in enumerate(record.rejected):
        try:
            ids = chat.encode_response(prompt, text, max_length=max_response)
        except ControlTokenError:
            ledger.refused_rejected += 1
        else:
            no_pieces = np.zeros(0, np.int32)
            yield _Response(i, text, np.array(ids, np.int32), no_pieces, {}, None)


def _columns(record: Record, i: int, num_tokens: int, ledger: _Ledger) -> dict[str, np.ndarray]:
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
        found[name] = np.array(values, np.float32)
    return found


def _score(record: Record, i: int) -> Score | None:
    score = record.scores[i] if record.scores else None
    return None if score is None else Score.ok(score)


def _refuse_wrong_columns(ledger: _Ledger) -> None:
    """A column that was made with other tokens says nothing about ours."""
    wrong = ledger.wrong_columns
    if wrong:
        more = [f"  ... and {len(wrong) - IDS_SHOWN} more"] if len(wrong) > IDS_SHOWN else []
        raise DataError(
            "\n".join(
                [
                    "columns of demonstrations need one number a token, the end token included:",
                    *wrong[:IDS_SHOWN],
                    *more,
                    "compute them on the ids of plait.rollouts.chat.ChatFormat(tokenizer).encode_response(prompt_ids, "
                    "text) with this model's tokenizer (docs/expert-losses.md)",
                ]
            )
        )


def _is_position(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _digest(records: Sequence[Record]) -> str:
    """Number and sha256 of everything that training reads of the records, in order."""
    digest = hashlib.sha256()
    for record in records:
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
        ]
        digest.update(json.dumps(fields).encode() + b"\n")
    return f"{len(records)} rows, sha256 {digest.hexdigest()}"
