"""What a type of expert loss receives, what it gives back, and how minibatch-wide statistics reach it.

Two phases. `prepare` sees the whole minibatch once, before any micro-batch: it records which tokens are kept
(`TrainBatch.expert_kept`) and counts or temperatures (`TrainBatch.stats`). Then the type itself is called on each
micro-batch. A type whose `prepare` looks at the current log-probs declares the need `minibatch_stats`; the learner
then runs a no-grad pass over the minibatch first.

A type may also remember: a number for each row or prompt that it has trained, in the checkpoint with the rest of the
algorithm's state (`AlgorithmBase.expert_memory`). `recall` runs after `prepare`, reads the memory by
`batch.sample_ids` (a demonstration) or `batch.group_names` (a prompt) and leaves columns for the loss and, in
`batch.visits`, what the memory takes over once the minibatch has been trained.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from math import ceil, floor
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from ..engine.config import Section
from ..engine.contracts import Need
from ..engine.errors import ConfigError, DataError
from ..engine.types import PolicyOutput, Source, TrainBatch
from .input_hooks import InputHook
from .losses import Members, Metrics, Normalizer, Reduced, sum_rows

if TYPE_CHECKING:
    from torch import Tensor

Denominator = Literal["kept_tokens", "all_tokens"]
COLUMNS_OF_THE_INPUT: frozenset[Need] = frozenset(
    {"base_logprobs", "history_logprobs", "behaviour_logprobs", "prompt_attention"}
)
"""Columns that depend on what the model read, and that nothing in a run can compute again."""


@dataclass(frozen=True)
class Supervised:
    """One micro-batch as a type sees it."""

    out: PolicyOutput
    batch: TrainBatch
    members: Members
    """The supervised tokens: EXPERT, weight not 0."""
    coefs: Mapping[str, float] = field(default_factory=dict)

    @property
    def logprobs(self) -> Tensor:
        return self.out.logprobs

    @cached_property
    def probability(self) -> Tensor:
        """exp(logprobs) as a constant."""
        return self.logprobs.detach().exp()

    def column(self, name: str) -> Tensor:
        """A per-token or per-row constant that the type declared in `needs`, 0 outside the supervised tokens."""
        values = getattr(self.batch, name)
        if values is None:
            if bool(self.members.mask.any()):
                raise DataError(f"the expert loss needs {name}, which the batch does not have")
            return self.logprobs.detach() * 0
        return (
            values if len(values) == self.batch.num_rows else values.where(self.members.mask, 0.0)
        )

    def kept(self) -> Tensor:
        """bool [T] as `prepare` chose."""
        if self.batch.expert_kept is None:
            raise ValueError("the expert loss selects tokens; call its `prepare` on the minibatch")
        return self.batch.expert_kept

    def stat(self, name: str) -> float:
        if self.batch.stats is None or name not in self.batch.stats:
            raise ValueError(f"no minibatch statistic {name!r}; call `prepare` on the minibatch")
        return self.batch.stats[name]

    def coef(self, name: str) -> float:
        if name not in self.coefs:
            raise ConfigError.at(
                "algorithm.expert_loss",
                name,
                "this scheduled coefficient is missing: the algorithm must add `expert_loss.coefs(step)` to its own "
                "and hand them to `expert_component`",
            )
        return self.coefs[name]

    def constant(self, value: float) -> Tensor:
        """A metric that is the same for the whole minibatch, as this micro-batch's share of it."""
        return self.members.mean(self.logprobs.detach() * 0 + value)

    def row_mean(self, values: Tensor) -> Tensor:
        """[N]: mean over the supervised tokens of each row, 0 where it has none."""
        counts = sum_rows(self.members.mask.to(values.dtype), self.batch)
        return sum_rows(values.where(self.members.mask, 0.0), self.batch) / counts.clamp(min=1)

    def weighted(self, weight: Tensor) -> TokenLoss:
        """x = sg[weight] ell, and the mean weight as a metric."""
        weight = weight.detach()
        return TokenLoss(-weight * self.logprobs, {"expert_weight_mean": self.members.mean(weight)})

    def selected(self, values: Tensor, denominator: Denominator, kept: Tensor) -> TokenLoss:
        """x = values on the kept tokens, counted as `denominator` says."""
        values = values.where(kept, 0.0)
        share = self.members.mean(kept.to(values.dtype))
        metrics = {"expert_kept_fraction": share}
        if denominator == "all_tokens":
            return TokenLoss(values, metrics)
        members = Members(kept, int(self.stat("kept_tokens")), int(self.stat("kept_rows")))
        return TokenLoss(values, metrics, members)


@dataclass(frozen=True)
class TokenLoss:
    """x_t of every token, before token weights and normalization."""

    values: Tensor
    metrics: Metrics = field(default_factory=dict)
    """Already divided: summed over micro-batches and ranks. Left out where nothing is supervised."""
    members: Members | None = None
    """The type's own counts; None: the supervised tokens."""
    normalizer: Normalizer | None = None
    """The type's own; None: the host's."""


class ExpertLossBase(Section):
    """Defaults of every type."""

    standalone: ClassVar[bool] = False
    """True: only for hosts whose expert rows stand alone."""
    scales_with_weights: ClassVar[bool] = True
    """False: token weights only decide membership."""
    remembers: ClassVar[bool] = False
    """True: `recall` leaves visits, which belong into the checkpoint."""
    input_hook: InputHook | None = None
    """Rewrites what the model reads on expert rows; only for hosts whose expert rows stand alone."""

    @model_validator(mode="after")
    def _columns_fit_the_input(self) -> ExpertLossBase:
        unfit = sorted(self.needs & COLUMNS_OF_THE_INPUT) if self.input_hook is not None else []
        if unfit:
            raise ValueError(
                f"the data's {', '.join(unfit)} belong to the unchanged input; leave out input_hook"
            )
        return self

    @property
    def kind(self) -> str:
        """The recipe's name of this type."""
        return type(self).model_fields["type"].default

    @property
    def needs(self) -> frozenset[Need]:
        """What it consumes beyond label log-probs; the host adds it to its own needs."""
        return frozenset()

    @property
    def entropy_top_k(self) -> int | None:
        """Logits that the need `topk_entropy` looks at."""
        return None

    @property
    def tokens_only(self) -> bool:
        """True where the host's normalizer must be `tokens`."""
        return False

    def coefs(self, step: int) -> dict[str, float]:
        """Scheduled coefficients at this many completed steps; a type adds its own to these."""
        return {} if self.input_hook is None else self.input_hook.coefs(step)

    def prepare(
        self, batch: TrainBatch, logprobs: Tensor | None, coefs: Mapping[str, float]
    ) -> TrainBatch:
        """Record statistics of the whole minibatch; `logprobs` are current where `minibatch_stats` is a need."""
        return batch

    def recall(
        self, batch: TrainBatch, logprobs: Tensor | None, memory: Mapping[str, float]
    ) -> TrainBatch:
        """Columns from what earlier minibatches left in `memory`; all of them are read before `visits` is kept."""
        return batch

    def evaluate(
        self, out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float]
    ) -> TokenLoss | Reduced:
        """The type on one micro-batch."""
        return self(Supervised(out, batch, Members.expert(batch), coefs))

    @abstractmethod
    def __call__(self, tokens: Supervised) -> TokenLoss | Reduced:
        """Values of the supervised tokens, with metrics and, where it selects, its own counts."""


def supervised(batch: TrainBatch) -> Tensor:
    return batch.is_trained(Source.EXPERT)


def stored(batch: TrainBatch, name: str) -> Tensor:
    """A column of the data on the whole minibatch. Raises DataError where a supervised token lacks it."""
    values, mask = getattr(batch, name), supervised(batch)
    if not bool(mask.any()):
        return batch.weights * 0
    if values is not None and len(values) == batch.num_rows:
        mask = sum_rows(mask.to(batch.weights.dtype), batch) > 0
    if values is None or bool(values[mask].isnan().any()):
        raise DataError(
            f"the expert loss needs {name} on every supervised token; the data lacks it"
        )
    return values


def with_kept(batch: TrainBatch, kept: Tensor, **stats: float) -> TrainBatch:
    """The minibatch with the chosen tokens and their counts."""
    rows = int((sum_rows(kept.to(batch.weights.dtype), batch) > 0).sum())
    counts = {"kept_tokens": float(kept.sum()), "kept_rows": float(rows), **stats}
    return replace(batch, expert_kept=kept, stats={**(batch.stats or {}), **counts})


def with_stats(batch: TrainBatch, **stats: float) -> TrainBatch:
    return replace(batch, stats={**(batch.stats or {}), **stats})


def rows_of(batch: TrainBatch) -> list[slice]:
    starts = batch.row_starts.tolist()
    return [slice(a, b) for a, b in pairwise(starts)]


def highest(scores: Tensor, mask: Tensor, count: int) -> Tensor:
    """bool: the `count` highest scores within the mask, ties to the earlier token."""
    candidates = mask.nonzero().squeeze(-1)
    order = scores[candidates].argsort(descending=True, stable=True)[:count]
    kept = mask & False
    kept[candidates[order]] = True
    return kept


def highest_share(
    scores: Tensor, batch: TrainBatch, fraction: float, scope: Literal["minibatch", "row"]
) -> Tensor:
    """bool [T]: the floor(fraction n) highest supervised tokens of the minibatch or of each row."""
    mask = supervised(batch)
    parts = [slice(None)] if scope == "minibatch" else rows_of(batch)
    kept = mask & False
    for part in parts:
        count = floor(fraction * int(mask[part].sum()) + 1e-9)
        kept[part] = highest(scores[part], mask[part], count)
    return kept


def rounded_up(fraction: float, count: int) -> int:
    return ceil(fraction * count - 1e-9)


def median(values: Tensor) -> float:
    """Mean of the middle two for an even count."""
    ordered = values.sort().values
    n = len(ordered)
    return float((ordered[(n - 1) // 2] + ordered[n // 2]) / 2)
