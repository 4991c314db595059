"""Records + tokenizer -> the run's `Data`: endless prompt streams and the held-out prompts.

One pass over the records at the start finds out which rows can be used and checks everything that can be wrong with
them; of a row only a few numbers are kept. Prompts are read and tokenized again when they are taken, so a data set may
be larger than memory. What comes next is a function of the streams' positions and of what the run observed of its
prompts, which is all that a checkpoint must hold.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.errors import DataError
from ..engine.metrics import SUCCESS
from ..engine.types import Prompt, RolloutGroup, Score
from .admission import TrainRow
from .admission_policy import Key
from .chat import ChatFormat
from .choose_streams import expert_streams, make_attempts, part_streams
from .config import DataConfig
from .data_report import COPY, IDS_SHOWN, DataReport, Ledger
from .encoder import Encoder
from .hints import HintDisplay
from .probe_table import Rate, read_rates
from .readers import read_records
from .records import Record, Records
from .split import text_key
from .streams import MixedStream
from .usable import Usable, parts_of, usable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Data:
    """Implements `engine.contracts.DataSource`."""

    eval_prompts: Sequence[Prompt]
    end_token_id: int
    """The token that ends a demonstration, and should end a sample."""
    show_hint: HintDisplay
    """A training prompt with the beginning of a solution in its user's turn."""

    def __init__(
        self,
        config: DataConfig,
        records: Records,
        kept: Usable,
        eval_prompts: Sequence[Prompt],
        report: DataReport,
        encoder: Encoder,
        total_prompts: int,
    ) -> None:
        chat = encoder.chat
        self.eval_prompts = eval_prompts
        self.end_token_id = chat.end_id
        self.show_hint = HintDisplay(chat, config.hint_template, encoder.max_prompt_length)
        self.report = report
        self._config, self._total_prompts = config, total_prompts
        self._encoder, self._chat = encoder, chat
        self._records, self._kept = records, kept
        self._dropped: Collection[Key] = ()
        self._scores: Mapping[Key, Score] = {}
        self._rates = self._probed()
        self._taken: dict[str, tuple[int, tuple[int, ...]]] = {}
        """Row and tokens of the prompts taken since the last `observe`."""
        self._order()

    def _order(self) -> None:
        """New streams over the prompts that are there."""
        config, records, kept = self._config, self._records, self._kept
        self._attempts = make_attempts(config, len(kept))
        self._prompts = MixedStream(
            part_streams(config, records, kept, self._total_prompts, self._attempts), self._attempts
        )
        self._experts = MixedStream(expert_streams(config, records, kept))
        self._begin_attempts()
        self._fingerprint = {
            "data.seed": config.seed,
            "training prompts": f"{len(kept)} rows, sha256 {kept.digest}",
            "prompts with a demonstration": self.num_experts,
            "drawing": json.dumps(
                [
                    config.sampling.model_dump(),
                    config.filter and config.filter.model_dump(),
                    [(part.name, part.weight) for part in records.parts],
                ]
            ),
        }
        if config.probe is not None:
            counts = [(n, r.scored, r.right, r.unknown) for n, r in sorted(self._rates.items())]
            digest = hashlib.sha256(json.dumps(counts).encode()).hexdigest()
            self._fingerprint["data.probe"] = f"{len(counts)} prompts, sha256 {digest}"

    def _probed(self) -> Mapping[str, Rate]:
        """Raises DataError where the table names a prompt that is not there."""
        if self._config.probe is None:
            return {}
        path = Path(self._config.probe)
        rates = read_rates(path)
        for prompt_id in rates:
            if self._row_of(prompt_id) is None:
                raise DataError(
                    f"{path}: no training prompt has the id {prompt_id!r}; give `plait probe` this recipe and "
                    "another folder"
                )
        return rates

    def _begin_attempts(self) -> None:
        """What a probe found is a first visit; prompts that the admission left out have none."""
        if self._attempts is None:
            return
        for prompt_id, rate in self._rates.items():
            row = self._row_of(prompt_id)
            if row is not None:
                correct = [i < rate.right for i in range(rate.scored)]
                self._attempts.observe(row, correct, rate.unknown, epoch=0)

    def is_out_of_reach(self, prompt_id: str) -> bool:
        """A probe found every rollout of the start model wrong."""
        rate = self._rates.get(prompt_id)
        return rate is not None and rate.reach == "out_of_reach"

    def rows(self) -> Iterator[TrainRow]:
        """Every training prompt, in the order of the data; the streams do not move."""
        return map(self._row, range(len(self._kept)))

    def row(self, prompt_id: str) -> TrainRow:
        """One of them; raises DataError where there is none."""
        return self._row(self._find(prompt_id))

    def admit(
        self, dropped: Collection[Key], left_out: Mapping[str, str], scores: Mapping[Key, Score]
    ) -> None:
        """Before the first `take`: remove demonstrations by place and prompts by id (with a reason), and store scores.

        Raises DataError where no training prompt is left.
        """
        self._dropped, self._scores = dropped, scores
        for row in {self._find(prompt_id) for prompt_id, _ in dropped}:
            prompt = self._row(row).prompt
            self._kept.demonstrated[row] = bool(prompt.demonstrations)
            self._kept.paired[row] = bool(prompt.demonstrations and prompt.rejected)
        rows = np.array([self._find(prompt_id) for prompt_id in left_out], np.int64)
        self._kept.leave_out(rows, left_out)
        counts = Counter(self.report.dropped)
        counts.update(left_out.values())
        first = {reason: list(shown) for reason, shown in self.report.first_dropped.items()}
        for prompt_id, reason in left_out.items():
            if len(shown := first.setdefault(reason, [])) < IDS_SHOWN:
                shown.append(prompt_id)
        self.report = replace(
            self.report,
            **count_kept(self._records, self._kept),
            dropped=dict(counts),
            first_dropped=first,
        )
        refuse_empty(self.report)
        self._order()

    @property
    def num_prompts(self) -> int:
        return len(self._kept)

    @property
    def num_experts(self) -> int:
        """Training prompts with at least one demonstration."""
        return int(self._kept.demonstrated.sum())

    def check_step(self, prompts: int, experts: int) -> None:
        """Raises DataError where one step's prompts cannot all be different, by the weights of a mixture too."""
        fewer = "lower loop.prompts_per_step or add data"
        shown = (
            "add demonstrations (data.columns.demonstration, data.demonstrations) or choose an algorithm that needs "
            "fewer"
        )
        for stream, count, what, remedy in (
            (self._prompts, prompts, "prompts", fewer),
            (self._experts, experts, "prompts with a demonstration", shown),
        ):
            for name, most, there in stream.shares(count):
                if most > there:
                    of = f"part {name!r} of the mixture" if name else "the training set"
                    weight = ", or lower the part's weight" if name else ""
                    raise DataError(
                        f"a step asks for {most} different {what}, {of} has {there}: {remedy}{weight}\n{self.report}"
                    )

    def take(self, n: int) -> Sequence[Prompt]:
        """The next n prompts, all different. Raises DataError where n is more than there are."""
        self.check_step(n, 0)
        return self._read(self._prompts.take(n))

    def take_experts(self, n: int) -> Sequence[Prompt]:
        """The next n prompts with a demonstration; raises DataError where there are not as many."""
        self.check_step(0, n)
        return self._read(self._experts.take(n))

    def peek(self, n: int) -> Sequence[Prompt]:
        """Some training prompts; the streams do not move."""
        return [self._row(row).prompt for row in range(min(n, self.num_prompts))]

    def find(self, prompt_id: str) -> Prompt:
        """A training prompt by its id; raises DataError where there is none."""
        return self._row(self._find(prompt_id)).prompt

    def _row_of(self, prompt_id: str) -> int | None:
        for row in self._kept.find(text_key(prompt_id)).tolist():
            if self._record(row).prompt_id == prompt_id:
                return row
        return None

    def _find(self, prompt_id: str) -> int:
        row = self._row_of(prompt_id)
        if row is None:
            raise DataError(f"no training prompt has the id {prompt_id!r}")
        return row

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids of the tokenizer."""
        return len(self._chat.tokenizer)

    def pair_tokens(self, max_response_length: int) -> Mapping[str, int]:
        """Tokens of the rows that a pairwise expert loss compares, by prompt."""
        found = {}
        for row in np.flatnonzero(self._kept.paired):
            prompt = self._row(int(row)).prompt
            responses = (prompt.demonstrations[0], *prompt.rejected)
            lengths = [min(len(r.token_ids), max_response_length) for r in responses]
            found[prompt.prompt_id] = sum(lengths) + len(lengths) * len(prompt.token_ids)
        return found

    def empty_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """The chat template around one empty user turn, after the prompt's own system message where it has one."""
        system = [m for m in prompt.messages[:1] if m["role"] in ("system", "developer")]
        return tuple(self._chat.encode_prompt([*system, {"role": "user", "content": ""}]))

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        """Count each prompt's own attempt of the step: its first group that asked it as it is, without a prefix."""
        taken, self._taken = self._taken, {}
        if self._attempts is None:
            return
        for group in groups:
            row, token_ids = taken.get(group.prompt.prompt_id, (None, ()))
            if row is None or token_ids != group.prompt.token_ids:
                continue
            pairs = zip(group.rollouts, group.scores, strict=True)
            scores = [score for rollout, score in pairs if not rollout.prefix_len]
            if not scores:
                continue
            del taken[group.prompt.prompt_id]
            correct = [score.reward >= SUCCESS for score in scores if score.reward is not None]
            unknown = len(scores) - len(correct)
            self._attempts.observe(row, correct, unknown, self._prompts.epoch_of(row))

    def metrics(self) -> Mapping[str, float]:
        """What is known of the prompts, where sampling or filter ask for it; names: docs/metrics.md."""
        if self._attempts is None:
            return {}
        return self._attempts.metrics(self._prompts.rows_and_epochs())

    def state_dict(self) -> dict[str, Any]:
        return {
            "prompts": self._prompts.state_dict(),
            "experts": self._experts.state_dict(),
            "attempts": None if self._attempts is None else self._attempts.state_dict(),
            "fingerprint": dict(self._fingerprint),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises DataError where the state is none, or belongs to other data, and says what differs."""
        saved = state.get("fingerprint")
        if not isinstance(saved, Mapping):
            raise DataError(f"not a state of this data source: it has the keys {sorted(state)}")
        changed = [
            f"{name} (checkpoint: {saved.get(name)}, now: {value})"
            for name, value in self._fingerprint.items()
            if saved.get(name) != value
        ]
        if changed:
            raise DataError(
                "the data set differs from the checkpoint's: "
                + "; ".join(changed)
                + ". Restore it, or start a new run from the exported model"
            )
        self._prompts.load_state_dict(state.get("prompts"))
        self._experts.load_state_dict(state.get("experts"))
        if self._attempts is not None:
            self._attempts.load_state_dict(state.get("attempts") or {})
        self._taken = {}

    def _record(self, row: int) -> Record:
        return self._records.train[int(self._kept.index[row])]

    def _row(self, number: int) -> TrainRow:
        """Read and tokenized, less what the admission dropped."""
        row = self._encoder.encode(self._record(number))
        if not self._dropped and not self._scores:
            return row
        name = row.prompt.prompt_id
        admitted = {
            place: replace(found, score=self._scores.get((name, place), found.score))
            for place, found in row.items()
            if (name, place) not in self._dropped
        }
        prompt = replace(row.prompt, demonstrations=tuple(admitted.values()))
        return replace(row, prompt=prompt, places=tuple(admitted))

    def _read(self, rows: Sequence[int]) -> list[Prompt]:
        prompts = [self._row(row).prompt for row in rows]
        for row, prompt in zip(rows, prompts, strict=True):
            self._taken[prompt.prompt_id] = row, prompt.token_ids
        return prompts


def load_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_eval: int,
    max_prompt_length: int,
    max_response_length: int,
    records: Records | None = None,
    total_prompts: int = 1,
    quarantine: Path | None = None,
) -> Data:
    """Read (unless `records` are given), check and order a data set.

    `total_prompts`: what the run draws, over which a curriculum is laid. Rows that are dropped are written to
    `quarantine`, where it is given.

    Raises what `read_records` raises, and DataError where no training prompt, or no held-out prompt
    of those asked for, is left after dropping what cannot be used.
    """
    records = read_records(config, num_eval) if records is None else records
    encoder = Encoder(ChatFormat(tokenizer), max_prompt_length, max_response_length)
    ledger = Ledger()
    for bad in records.bad:
        ledger.drop_bad(bad)
    for i in range(len(records.copies)):
        ledger.drop(records.copies, i, COPY)
    kept = Usable(records.train, encoder, ledger)
    long = ledger.long_demonstrations
    eval_prompts = tuple(row.prompt for _, _, row in usable(records.held_out, encoder, ledger))
    ledger.refuse_wrong_columns()
    if quarantine is not None:
        ledger.write(quarantine)
    read = len(records.train) + len(records.held_out) + len(records.copies)
    report = DataReport(
        rows=read + sum(map(len, records.bad)),
        held_out=len(eval_prompts),
        dropped=dict(ledger.dropped),
        first_dropped=ledger.first,
        long_demonstrations=long,
        refused_demonstrations=ledger.refused_demonstrations,
        refused_rejected=ledger.refused_rejected,
        **count_kept(records, kept),
    )
    refuse_empty(report)
    if len(records.held_out) and not eval_prompts:
        raise DataError(f"no held-out prompt is left:\n{report}")
    return Data(config, records, kept, eval_prompts, report, encoder, total_prompts)


def count_kept(records: Records, kept: Usable) -> dict[str, Any]:
    """The report's numbers of training prompts."""
    return {
        "kept": len(kept),
        "with_demonstration": int(kept.demonstrated.sum()),
        "with_pair": int(kept.paired.sum()),
        "parts": {part.name: len(rows) for part, rows in parts_of(records, kept) if part.name},
    }


def refuse_empty(report: DataReport) -> None:
    """Raises DataError where no training prompt, or none of a part, is left."""
    empty = [name for name, count in report.parts.items() if not count]
    if not report.kept or empty:
        of = f" of part {empty[0]!r}" if empty else ""
        raise DataError(f"no training prompt{of} is left:\n{report}")
