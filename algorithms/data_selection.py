"""Which demonstrations of a step train: `data_selection`, next to the `expert_loss` of `sft`.

A rule never differentiates, and decides the same from the same inputs and memory. Two kinds:

* rules on recorded columns (`q_tuning`, `uds`, `lobass`) see the whole candidate batch after the no-grad pass and drop
  tokens or rows of it;
* rules on rollouts of the demonstrations' own prompts (`self_response`, `rollout_filter`: rollout_selection.py)
  replace or drop rows before the batch is made.

`Selection` carries a rule through a run. What was dropped enters no count; rows that train nothing are not computed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from math import exp
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from ..engine.contracts import Need
from ..engine.types import (
    Prompt,
    RolloutGroup,
    RolloutRequest,
    Sample,
    Sampling,
    Source,
    TrainBatch,
)
from .rollout_selection import RolloutFilter, SelectionRule, SelfResponse
from .selection_rules import (
    best,
    lobass_scores,
    prune_tokens,
    q_tuning_rows,
    share_of,
    uds_scores,
)

if TYPE_CHECKING:
    from torch import Tensor

Memory = MutableMapping[str, Any]
"""What a rule remembers between steps; JSON-able, in the checkpoint."""


class BatchRule(SelectionRule):
    """A rule on recorded columns of the candidate batch."""

    @abstractmethod
    def choose(self, rows: Sequence[Candidate], memory: Memory) -> Mapping[int, Sequence[bool]]:
        """For each kept row (its place in `rows`), which of its supervised tokens stay.

        `memory` may get new values; those it has are not changed in place.
        """


class Candidate:
    """One row of the candidate batch, with lists over its supervised tokens only."""

    def __init__(self, batch: TrainBatch, row: int, places: Tensor) -> None:
        self._batch, self.row, self.places = batch, row, places
        self.sample_id = batch.sample_ids[row] if batch.sample_ids else ""

    def column(self, name: str) -> list[float]:
        """A recorded per-token column."""
        return self._recorded(name)[self.places].double().tolist()

    def mean_loss(self, name: str) -> float:
        """Mean negative log-prob of the column."""
        values = self.column(name)
        return -sum(values) / len(values)

    @property
    def norm(self) -> float:
        return float(self._recorded("logit_norms")[self.row])

    @property
    def sketch(self) -> list[float]:
        return self._recorded("logit_sketches")[self.row].tolist()

    def _recorded(self, name: str) -> Tensor:
        values = getattr(self._batch, name)
        if values is None:
            raise ValueError(f"data_selection reads {name}, which was not recorded; declare it")
        return values

    def __len__(self) -> int:
        return len(self.places)


class QTuning(BatchRule):
    """Keep confident-and-diverse rows whole and uncertain-but-narrow ones pruned (arXiv 2509.23873)."""

    type: Literal["q_tuning"]
    sample_keep_fraction: float = Field(default=0.5, gt=0, le=1)
    token_keep_fraction: float = Field(default=0.5, gt=0, le=1)
    neighbor_weight: float = Field(default=0.5, ge=0, le=1)
    bisection_steps: int = Field(default=10, ge=1)
    drop_tokens: Literal["highest", "lowest"] = "highest"
    """Which scores a pruned row loses."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"old_logprobs", "old_entropy"})

    def rows(
        self, perplexity: Sequence[float], entropy: Sequence[float]
    ) -> tuple[list[int], list[int], list[int]]:
        """(kept whole, kept pruned, added to fill up) of the candidates' perplexities and mean entropies."""
        return q_tuning_rows(perplexity, entropy, self.sample_keep_fraction, self.bisection_steps)

    def tokens(self, nll: Sequence[float]) -> list[bool]:
        """Which tokens of a pruned row stay, from their negative log-probs."""
        keep = self.token_keep_fraction, self.neighbor_weight, self.drop_tokens
        return prune_tokens(nll, *keep)

    def choose(self, rows: Sequence[Candidate], memory: Memory) -> Mapping[int, Sequence[bool]]:
        perplexity = [exp(row.mean_loss("old_logprobs")) for row in rows]
        entropy = [sum(row.column("old_entropy")) / len(row) for row in rows]
        whole, pruned, added = self.rows(perplexity, entropy)
        kept = {i: [True] * len(rows[i]) for i in (*whole, *added)}
        for i in pruned:
            kept[i] = self.tokens([-value for value in rows[i].column("old_logprobs")])
        return kept


class Uds(BatchRule):
    """Keep rows of useful and unusual logits (arXiv 2510.16882): nuclear norm plus distance to a buffer of sketches."""

    type: Literal["uds"]
    keep_rows: int = Field(default=1, ge=1)
    """Of each step."""
    diversity_weight: float = Field(default=0.0025, ge=0)
    buffer_size: int = Field(default=1024, ge=1)
    """Sketches of trained rows that are remembered, first in first out."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"row_sketch"})

    def rank(
        self, norms: Sequence[float], sketches: Sequence[Sequence[float]], memory: Memory
    ) -> tuple[list[float], list[int]]:
        """(scores, kept rows in order); the kept rows' sketches enter the buffer."""
        buffer = memory.get("buffer", [])
        scores = uds_scores(norms, sketches, buffer, self.diversity_weight)
        kept = best(scores, self.keep_rows)
        memory["buffer"] = [*buffer, *(list(sketches[i]) for i in kept)][-self.buffer_size :]
        return scores, kept

    def choose(self, rows: Sequence[Candidate], memory: Memory) -> Mapping[int, Sequence[bool]]:
        _, kept = self.rank([row.norm for row in rows], [row.sketch for row in rows], memory)
        return {i: [True] * len(rows[i]) for i in kept}


class Lobass(BatchRule):
    """Keep rows whose loss training lowers most (arXiv 2310.13008): (base - reference) / base.

    The base loss is that of the run's frozen reference, the model before training. The reference loss is the row's at
    its last visit in this run, before that step's update; a row without one is kept, and not ranked.
    """

    type: Literal["lobass"]
    keep_fraction: float = Field(default=0.1667, gt=0, le=1)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"recorded_logprobs", "ref_logprobs"})

    def rank(self, base: Sequence[float], ref: Sequence[float]) -> tuple[list[float], list[int]]:
        """(scores, kept rows in order) of mean losses."""
        scores = lobass_scores(base, ref)
        return scores, best(scores, share_of(self.keep_fraction, len(scores)))

    def choose(self, rows: Sequence[Candidate], memory: Memory) -> Mapping[int, Sequence[bool]]:
        losses = memory.get("losses", {})
        seen = [i for i, row in enumerate(rows) if row.sample_id in losses]
        base = [rows[i].mean_loss("ref_logprobs") for i in seen]
        _, ranked = self.rank(base, [losses[rows[i].sample_id] for i in seen])
        kept = {seen[i] for i in ranked} | (set(range(len(rows))) - set(seen))
        now = {row.sample_id: row.mean_loss("old_logprobs") for row in rows if row.sample_id}
        memory["losses"] = {**losses, **now}
        return {i: [True] * len(rows[i]) for i in sorted(kept)}


DataSelection = Annotated[
    QTuning | Uds | Lobass | SelfResponse | RolloutFilter, Field(discriminator="type")
]


class Selection:
    """One rule in a run: its memory and what it did in the last step.

    `finish` may be called several times in a step (gradients are measured on the batch too). Each call decides from
    the memory that the step began with; what the last one left is the memory of the next step.
    """

    def __init__(self, rule: SelectionRule) -> None:
        self.rule = rule
        self.memory: dict[str, Any] = {}
        self.state: dict[str, Any] = {}
        """The memory after the step under way: what a checkpoint holds."""
        self.metrics: dict[str, float] = {}
        self.dropped: dict[str, str] = {}
        """prompt_id -> why its demonstration did not train in the last step."""

    def requests(self, prompts: Sequence[Prompt], sampling: Sampling) -> tuple[RolloutRequest, ...]:
        """Rollouts of the demonstrations' prompts, where the rule asks for them."""
        num = self.rule.num_rollouts
        return tuple(RolloutRequest(prompt, num, sampling) for prompt in prompts if num)

    def rows(self, rows: Sequence[Sample], groups: Sequence[RolloutGroup]) -> list[Sample]:
        """Begin a step: its rows, after the verifier has seen the rollouts of their prompts."""
        self.memory = self.state
        judged = self.rule.judge_rows(rows, groups)
        self.metrics, self.dropped = dict(judged.metrics), dict(judged.dropped)
        self._count(len(judged.rows), len(rows))
        return list(judged.rows)

    def finish(self, batch: TrainBatch) -> TrainBatch:
        """The batch without the rows and tokens that the rule drops. Denominators are those of what is left."""
        if not isinstance(self.rule, BatchRule):
            return batch
        rows, memory = candidates(batch), dict(self.memory)
        kept = self.rule.choose(rows, memory)
        self.state = memory
        self._count(len(kept), len(rows))
        self.dropped = {
            batch.group_names[row.row]: "not_selected"
            for i, row in enumerate(rows)
            if i not in kept
        }
        total = sum(len(row) for row in rows)
        if total:
            self.metrics["selection_kept_tokens"] = sum(map(sum, kept.values())) / total
        return reduced(batch, {rows[i].row: (rows[i].places, kept[i]) for i in kept})

    def _count(self, kept: int, total: int) -> None:
        if total:
            self.metrics["selection_kept_rows"] = kept / total
            self.metrics["selection_empty"] = float(kept == 0)


def candidates(batch: TrainBatch) -> list[Candidate]:
    """Rows with a supervised token; all others are no candidates."""
    supervised = batch.is_trained(Source.EXPERT)
    places = [
        (supervised & (batch.row_ids == row)).nonzero().squeeze(-1) for row in range(batch.num_rows)
    ]
    return [Candidate(batch, row, found) for row, found in enumerate(places) if len(found)]


def reduced(batch: TrainBatch, kept: Mapping[int, tuple[Tensor, Sequence[bool]]]) -> TrainBatch:
    """Only the named rows, with weight 0 on the tokens that go."""
    from ..engine.batch import count, select

    weights = batch.weights * 0
    for places, flags in kept.values():
        weights[places] = batch.weights[places] * batch.weights.new_tensor(flags)
    left = select(replace(batch, weights=weights), sorted(kept))
    return replace(left, denom=count(left))
