"""What is wrong with demonstrations, and with the prompts they answer: findings about each, and counts by source.

`Examination` sees every training row once (`add`), and some of them again with the verifier's scores (`judge`). It
knows no reward function and no data source. What follows from the findings is in admission_policy.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from ..engine.metrics import SUCCESS
from ..engine.types import Demonstration, Prompt, Score
from .admission_policy import Finding, Key, Reason
from .overlap import NGRAM, HeldOutText
from .text_signs import is_invisible, template_markup, unfinished_part

CUT = ("length", "max_tokens", "abort", "content_filter")
"""Values of metadata.finish_reason of a response that was not finished."""


@dataclass(frozen=True, slots=True)
class TrainRow:
    """A training prompt, and which of the row's demonstrations it holds: one with a control token is missing."""

    prompt: Prompt
    source: str
    places: tuple[int, ...]
    """Of `prompt.demonstrations` in the row."""
    refused: Mapping[int, str] = field(default_factory=dict)
    """Text by place of those with a control token."""

    def items(self) -> Iterator[tuple[int, Demonstration]]:
        yield from zip(self.places, self.prompt.demonstrations, strict=True)


@dataclass
class Source:
    """What one source of the data gave."""

    rows: int = 0
    demonstrations: int = 0
    """Those with a control token included."""
    right: int = 0
    wrong: int = 0
    unknown: int = 0
    stored: int = 0
    """Of the scores, those that came with the data."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of the demonstrations, end token included; of a very long text, a lower bound."""

    @property
    def not_graded(self) -> int:
        return self.demonstrations - self.right - self.wrong - self.unknown


class Examination:
    """Findings about all training rows. Memory: about half a kilobyte a row."""

    def __init__(
        self,
        held_out: Sequence[Prompt],
        max_response_length: int,
        *,
        demonstrations: bool = True,
    ) -> None:
        self.findings: list[Finding] = []
        self.sources: dict[str, Source] = {}
        self.places: dict[str, tuple[int, ...]] = {}
        """Of all demonstrations, by prompt id; those with a control token included."""
        self.scores: dict[Key, Score] = {}
        """The verifier's, where it could tell."""
        self.ungraded: dict[str, int] = {}
        """Prompts by id, with the number of demonstrations that the data stores no score of."""
        self._limit = max_response_length
        self._looks_at_demonstrations = demonstrations
        self._held_out = HeldOutText(held_out)
        self._prompts: dict[bytes, str] = {}
        self._texts: dict[bytes, Key] = {}

    def add(self, row: TrainRow) -> None:
        """Everything but verdicts of the verifier; scores that came with the data count as such."""
        prompt, source = row.prompt, self.sources.setdefault(row.source, Source())
        source.rows += 1
        self._examine_prompt(row)
        if not self._looks_at_demonstrations:
            return
        places = (*row.places, *row.refused)
        if places:
            self.places[prompt.prompt_id] = places
        source.demonstrations += len(places)
        for place in row.refused:
            self._find(row, place, Reason.CONTROL_TOKEN, "holds a control token")
        own: set[str] = set()
        for place, demonstration in row.items():
            source.lengths.append(len(demonstration.token_ids))
            self._examine_text(row, place, demonstration, own)
            self._examine_tokens(row, place, demonstration)
            if demonstration.score is None:
                self.ungraded[prompt.prompt_id] = self.ungraded.get(prompt.prompt_id, 0) + 1
            else:
                source.stored += 1
                self._judge(row, place, demonstration.score)

    def judge(self, row: TrainRow, graded: Prompt) -> None:
        """`graded` is the row's prompt with a score on each demonstration; those of the data were judged before."""
        for (place, before), after in zip(row.items(), graded.demonstrations, strict=True):
            if before.score is None and after.score is not None:
                self._judge(row, place, after.score)
                if after.score.reward is not None:
                    self.scores[row.prompt.prompt_id, place] = after.score

    def finish(self) -> None:
        """After the last row: what is known only then."""
        for overlap in self._held_out.partial():
            detail = f"{overlap.share:.0%} of its {NGRAM}-grams are held out, some in {overlap.held_out!r}"
            found = Finding(overlap.prompt_id, None, Reason.EVAL_OVERLAP, detail)
            self.findings.append(found)

    def _find(self, row: TrainRow, place: int | None, reason: Reason, detail: str) -> None:
        self.findings.append(Finding(row.prompt.prompt_id, place, reason, detail))

    def _examine_prompt(self, row: TrainRow) -> None:
        prompt = row.prompt
        overlap = self._held_out.add(prompt)
        if overlap is not None:
            detail = f"all of its {NGRAM}-grams are held out, some in {overlap.held_out!r}"
            self._find(row, None, Reason.EVAL_COPY, detail)
        markup = next(filter(None, (template_markup(m["content"]) for m in prompt.messages)), None)
        if markup:
            self._find(row, None, Reason.FOREIGN_TEMPLATE, f"its prompt holds {markup!r}")
        text = "\0".join(f"{m['role']}\0{m['content']}" for m in prompt.messages)
        first = self._prompts.setdefault(_digest(text), prompt.prompt_id)
        if first != prompt.prompt_id:
            self._find(row, None, Reason.DUPLICATE_PROMPT, f"the prompt of {first!r}")

    def _examine_text(
        self, row: TrainRow, place: int, demonstration: Demonstration, own: set[str]
    ) -> None:
        text = demonstration.text
        if is_invisible(text):
            self._find(row, place, Reason.EMPTY, f"{len(text)} invisible characters")
            return
        if markup := template_markup(text):
            self._find(row, place, Reason.FOREIGN_TEMPLATE, f"holds {markup!r}")
        if part := unfinished_part(text):
            self._find(row, place, Reason.NO_END, f"{part!r} is never closed")
        elif (reason := finish_reason(row.prompt, place)) in CUT:
            self._find(row, place, Reason.NO_END, f"metadata.finish_reason is {reason!r}")
        if text in own:
            self._find(row, place, Reason.DUPLICATE, "the same text twice")
        elif len(text.split(maxsplit=NGRAM - 1)) == NGRAM:
            key = (row.prompt.prompt_id, place)
            first = self._texts.setdefault(_digest(text), key)
            if first != key:
                detail = f"the text of demonstration {first[1]} of {first[0]!r}"
                self._find(row, place, Reason.DUPLICATE, detail)
        own.add(text)

    def _examine_tokens(self, row: TrainRow, place: int, demonstration: Demonstration) -> None:
        num, limit = len(demonstration.token_ids), self._limit
        weights = demonstration.columns.get("token_weights")
        if weights is not None and not any(weights[:limit]):
            beyond = ", and others beyond the limit" if any(weights) else ""
            self._find(row, place, Reason.FULLY_MASKED, f"all its weights are 0{beyond}")
        elif num > limit:
            detail = f"{num} tokens, rollouts.max_response_length = {limit}"
            self._find(row, place, Reason.TOO_LONG, detail)

    def _judge(self, row: TrainRow, place: int, score: Score) -> None:
        source = self.sources[row.source]
        if score.reward is None:
            source.unknown += 1
            self._find(row, place, Reason.UNKNOWN, score.reason)
        elif score.reward < SUCCESS:
            source.wrong += 1
            self._find(row, place, Reason.WRONG, f"reward {score.reward:g}")
        else:
            source.right += 1


def finish_reason(prompt: Prompt, place: int) -> object:
    """metadata.finish_reason: a text, or a list with one for each demonstration of the row."""
    value = prompt.metadata.get("finish_reason")
    if isinstance(value, list | tuple):
        return value[place] if place < len(value) else None
    return value


def _digest(text: str) -> bytes:
    """Of the text with its white space collapsed."""
    return blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
