"""Expert losses that hold a chosen response against rejected ones of the same prompt.

With S the sum of log p over a row's supervised tokens, T their number, D = S - (the same sum under the reference) and
a = S / T, each pair (chosen c, rejected r) has a margin; the loss is a mean over all pairs of the minibatch, or over
prompts. A group is complete with a chosen and a rejected row that have supervised tokens; others are ignored. Token
weights only decide membership, and the host's normalizer plays no part.

Paired rows of one group share a micro-batch (`engine.batch.units`), so a pair never needs a collective. How many there
are in the whole minibatch is counted by `prepare`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import log, nan
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ..engine.contracts import Need
from ..engine.errors import DataError
from ..engine.types import PolicyOutput, TrainBatch
from .expert_base import ExpertLossBase, Supervised, supervised, with_stats
from .expert_selection import log_one_minus_exp
from .losses import Members, Metrics, Reduced, sum_rows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """The P pairs of complete groups in a batch, as row numbers."""

    chosen: Tensor  # i64 [P]
    rejected: Tensor  # i64 [P]

    @classmethod
    def of(cls, batch: TrainBatch) -> Pairs:
        """Every (chosen, rejected) combination of each group. Raises DataError where supervised rows have no role."""
        if batch.pairs is None and not bool(supervised(batch).any()):
            empty = batch.group_ids[:0]
            return cls(empty, empty)
        if batch.pairs is None:
            raise DataError(
                "a pairwise expert loss needs chosen and rejected rows, and no row of the batch has a role"
            )
        counts = sum_rows(supervised(batch).to(batch.weights.dtype), batch)
        if bool(((counts > 0) & (batch.pairs == 0)).any()):
            raise DataError(
                "a pairwise expert loss needs a role on every supervised row: mark it chosen or rejected"
            )
        chosen, rejected = (counts > 0) & (batch.pairs > 0), (counts > 0) & (batch.pairs < 0)
        same = batch.group_ids[:, None] == batch.group_ids[None, :]
        found = (same & chosen[:, None] & rejected[None, :]).nonzero()
        return cls(found[:, 0], found[:, 1])

    @property
    def groups(self) -> Tensor:
        """Row number of each chosen row, once: i64 [number of complete groups]."""
        return self.chosen.unique()


@dataclass(frozen=True)
class Scores:
    """Rows of one micro-batch as a pairwise type sees them: float [N]."""

    tokens: Supervised
    pairs: Pairs

    @cached_property
    def sums(self) -> Tensor:
        """S."""
        logprobs = self.tokens.logprobs.where(self.tokens.members.mask, 0.0)
        return sum_rows(logprobs, self.tokens.batch)

    @cached_property
    def means(self) -> Tensor:
        """a."""
        return self.tokens.row_mean(self.tokens.logprobs)

    @cached_property
    def ref_sums(self) -> Tensor:
        return sum_rows(self.tokens.column("ref_logprobs"), self.tokens.batch)

    @cached_property
    def gains(self) -> Tensor:
        """D."""
        return self.sums - self.ref_sums

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """[N] -> the chosen and the rejected row's of each pair, [P] each."""
        return values[self.pairs.chosen], values[self.pairs.rejected]


class PairwiseLoss(ExpertLossBase):
    """Counts of the whole minibatch, shared by all types."""

    standalone: ClassVar[bool] = True
    scales_with_weights: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"pairs"})

    def prepare(
        self, batch: TrainBatch, logprobs: Tensor | None, coefs: Mapping[str, float]
    ) -> TrainBatch:
        pairs = Pairs.of(batch)
        counts = sum_rows(supervised(batch).to(batch.weights.dtype), batch)
        return with_stats(
            batch,
            pairs=len(pairs.chosen),
            groups=len(pairs.groups),
            chosen_tokens=float(counts[pairs.groups].sum()),
        )


class PairLoss(PairwiseLoss):
    """A mean over pairs. A subclass gives the loss and the margin of each pair."""

    @abstractmethod
    def compare(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Loss and margin of each pair, [P] each."""

    def __call__(self, tokens: Supervised) -> Reduced:
        scores = Scores(tokens, Pairs.of(tokens.batch))
        losses, margins = self.compare(scores)
        num, margins = max(tokens.stat("pairs"), 1), margins.detach()
        metrics = {
            "expert_margin": margins.sum() / num,
            "expert_pair_accuracy": (margins > 0).to(margins.dtype).sum() / num,
        }
        return reduce(losses.sum() / num, metrics, scores)


def reduce(value: Tensor, metrics: Metrics, scores: Scores) -> Reduced:
    """The component with its metrics, which are left out where the minibatch has no complete group."""
    tokens = scores.tokens
    if not tokens.stat("pairs"):
        return Reduced(value, {})
    sums = sum_rows(tokens.probability.where(tokens.members.mask, 0.0), tokens.batch)
    mean = sums[scores.pairs.groups].sum() / tokens.stat("chosen_tokens")
    return Reduced(value, {"expert_probability": mean, **metrics})


class Dpop(PairLoss):
    """DPO-Positive (arXiv 2402.13228): softplus(-preference_scale margin), and the chosen row must not lose
    probability: margin = D_c - D_r - chosen_penalty_coef max(0, -D_c).
    """

    type: Literal["dpop"] = "dpop"
    preference_scale: float = Field(default=0.3, gt=0)
    """beta in the paper."""
    chosen_penalty_coef: float = Field(default=50.0, ge=0)
    """lambda in the paper; 0 is DPO."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"pairs", "ref_logprobs"})

    def compare(self, scores: Scores) -> tuple[Tensor, Tensor]:
        chosen, rejected = scores.split(scores.gains)
        margins = chosen - rejected - self.chosen_penalty_coef * (-chosen).relu()
        return softplus(-self.preference_scale * margins), margins


class Spin(PairLoss):
    """Self-play fine-tuning (arXiv 2401.01335): a demonstration against a sample of an earlier iterate, which is the
    reference: margin = D_c - D_r.
    """

    type: Literal["spin"] = "spin"
    preference_scale: float = Field(default=0.1, gt=0)
    margin_loss: Literal["logistic", "hinge"] = "logistic"
    """logistic: softplus(-preference_scale margin); hinge: max(0, 1 - preference_scale margin)."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"pairs", "ref_logprobs"})

    def compare(self, scores: Scores) -> tuple[Tensor, Tensor]:
        chosen, rejected = scores.split(scores.gains)
        margins = chosen - rejected
        scaled = self.preference_scale * margins
        hinge = self.margin_loss == "hinge"
        return (1 - scaled).relu() if hinge else softplus(-scaled), margins


class AlignedAsft(PairLoss):
    """Aligned SFT through absolute likelihood (arXiv 2409.10571), without a reference:
    -(1 + odds_coef) a_c - odds_coef log(1 - exp(a_r)); margin = a_c - a_r.
    """

    type: Literal["aligned_asft"] = "aligned_asft"
    odds_coef: float = Field(default=0.1, ge=0)

    def compare(self, scores: Scores) -> tuple[Tensor, Tensor]:
        chosen, rejected = scores.split(scores.means)
        losses = -(1 + self.odds_coef) * chosen - self.odds_coef * log_one_minus_exp(rejected)
        return losses, chosen - rejected


class Redi(PairLoss):
    """Reinforcement distillation (arXiv 2505.24850): -chosen_coef a_c + rejected_coef a_r, unbounded below;
    margin = a_c - a_r.
    """

    type: Literal["redi"] = "redi"
    chosen_coef: float = Field(default=1.0, ge=0)
    rejected_coef: float = Field(default=0.8, ge=0)

    def compare(self, scores: Scores) -> tuple[Tensor, Tensor]:
        chosen, rejected = scores.split(scores.means)
        return -self.chosen_coef * chosen + self.rejected_coef * rejected, chosen - rejected


class DiscriminativeFt(PairwiseLoss):
    """Discriminative fine-tuning (arXiv 2502.18679): the chosen row against the softmax over the rejected ones, whose
    normalizer u is a running estimate that each prompt remembers.

    d_j = s_j / score_temperature - sref_j, with u updated from them first; loss = -s_c + mean_j sg[exp(d_j - u)] s_j,
    averaged over prompts. s = S and sref the reference's sum; `reference_free`: s = a, sref = 0.
    """

    type: Literal["discriminative_ft"] = "discriminative_ft"
    reference_free: bool = False
    score_temperature: float | None = Field(default=None, gt=0)
    """null: 1.0, reference-free 0.3."""
    normalizer_rate: float | None = Field(default=None, gt=0, le=1)
    """Share of the new estimate in u; null: 0.85, reference-free 0.9."""
    normalizer_init: float = 0.0
    """u of a prompt that was never visited."""

    remembers: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[Need]:
        ref: set[Need] = set() if self.reference_free else {"ref_logprobs"}
        return frozenset({"pairs", "minibatch_stats", *ref})

    @property
    def temperature(self) -> float:
        return self.score_temperature or (0.3 if self.reference_free else 1.0)

    @property
    def rate(self) -> float:
        return self.normalizer_rate or (0.9 if self.reference_free else 0.85)

    def normalizers(self, previous: Tensor, ratios: Tensor, pairs: Pairs) -> Tensor:
        """[N] stored u (NaN: never visited), d [P] -> [N] new u, meaningful on chosen rows of complete groups.

        u <- logaddexp(log(1 - rate) + u, log rate + log mean_j exp(d_j)).
        """
        index, counts = pairs.chosen, rejected_counts(pairs, len(previous))
        highest = ratios.new_full((len(previous),), float("-inf"))
        highest = highest.scatter_reduce(0, index, ratios, "amax")
        shares = (ratios - highest[index]).exp()
        total = ratios.new_zeros(len(previous)).index_add(0, index, shares)
        estimate = log(self.rate) + highest + (total / counts).log()
        if self.rate == 1:
            return estimate
        stored = previous.where(previous == previous, self.normalizer_init)
        return (log(1 - self.rate) + stored).logaddexp(estimate)

    def rejected_coefs(self, normalizers: Tensor, ratios: Tensor, pairs: Pairs) -> Tensor:
        """[P] exp(d_j - u) / J."""
        counts = rejected_counts(pairs, len(normalizers))
        return (ratios - normalizers[pairs.chosen]).exp() / counts[pairs.chosen]

    def ratios(self, rejected: Tensor, ref_rejected: Tensor | None) -> Tensor:
        """d_j of scores and reference scores, [P] each; constants."""
        scaled = rejected.detach() / self.temperature
        return scaled if ref_rejected is None else scaled - ref_rejected

    def measure(self, tokens: Supervised) -> tuple[Scores, Tensor, Tensor]:
        """Scores, s of every row [N], d of every pair [P]."""
        scores = Scores(tokens, Pairs.of(tokens.batch))
        rows = scores.means if self.reference_free else scores.sums
        rejected = scores.pairs.rejected
        ref = None if self.reference_free else scores.ref_sums[rejected]
        return scores, rows, self.ratios(rows[rejected], ref)

    def recall(
        self, batch: TrainBatch, logprobs: Tensor | None, memory: Mapping[str, float]
    ) -> TrainBatch:
        """The new normalizer of each complete group, from the one its prompt remembers and the present log-probs."""
        assert logprobs is not None
        tokens = Supervised(PolicyOutput(logprobs), batch, Members.expert(batch))
        scores, _, ratios = self.measure(tokens)
        last = logprobs.new_tensor([memory.get(name, nan) for name in batch.group_names])
        updated = self.normalizers(last, ratios, scores.pairs)
        visits = {
            batch.group_names[row]: updated[row].item() for row in scores.pairs.groups.tolist()
        }
        return replace(batch, log_normalizers=updated, visits=visits)

    def __call__(self, tokens: Supervised) -> Reduced:
        scores, rows, ratios = self.measure(tokens)
        pairs, groups = scores.pairs, scores.pairs.groups
        normalizers = tokens.column("log_normalizers")
        coefs = self.rejected_coefs(normalizers, ratios, pairs)
        num = max(tokens.stat("groups"), 1)
        value = ((coefs * rows[pairs.rejected]).sum() - rows[groups].sum()) / num
        mean = normalizers[groups].sum() / num
        return reduce(value, {"expert_log_normalizer": mean}, scores)


def rejected_counts(pairs: Pairs, num_rows: int) -> Tensor:
    """[N] pairs of each chosen row; 0 for all others."""
    return pairs.chosen.bincount(minlength=num_rows)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) without overflow, with slope 1/2 at 0."""
    return x.logaddexp(x.new_zeros(()))
