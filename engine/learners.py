"""All learner ranks behind one door: cut the batch, hand each rank its part, put the answers together."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from .batch import (
    ROW_FIELDS,
    count,
    has_gradient,
    seed_of,
    select,
    split_minibatches,
    with_gradient,
)
from .config import LearnerConfig
from .contracts import Need, PrepareFn, RememberFn
from .durable import FileRecord
from .errors import LearnerError
from .learner import LearnerWorker, WeightRoute, learning_rate
from .packing import Partition, partition
from .probes import GradientComparison, GradientProbe
from .shared_prefix import mark_prefixes
from .step_sums import REMEDY
from .types import (
    Source,
    TrainBatch,
    Update,
    UpdateReport,
)

PROMPTS_SHOWN = 8
READ_BEFORE = frozenset[Need]({"recorded_logprobs", "old_entropy", "values", "row_sketch"})
"""Columns that the algorithm's `finish` reads, of every row."""


class Ranks(Protocol):
    """Calls a method of every learner worker, each with its own arguments."""

    world_size: int

    def call(self, method: str, per_rank: Sequence[tuple[Any, ...]]) -> list[Any]: ...

    def restart(self) -> None:
        """End all ranks, whatever they do, and start them afresh."""
        ...

    def status(self) -> Sequence[Mapping[str, Any]]:
        """What each rank does now; callable from any thread."""
        ...

    def close(self) -> None: ...


class InProcessRank:
    """One rank in this process: tests, profiling, `plait check loss`."""

    world_size = 1

    def __init__(self, worker: LearnerWorker) -> None:
        self.worker = worker

    def call(self, method: str, per_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [getattr(self.worker, method)(*per_rank[0])]

    def restart(self) -> None:
        raise LearnerError("the learner lives in this process; only a new process restarts it")

    def status(self) -> Sequence[Mapping[str, Any]]:
        return ()

    def close(self) -> None:
        self.worker.close()


@dataclass(frozen=True)
class Begun:
    """Rows whose gradient is there before the step's other rows are."""

    batch: TrainBatch
    loss: str
    coefs: Mapping[str, float]
    tokens: int
    """Of the forward passes."""

    def is_same(self, rows: TrainBatch, loss: str, coefs: Mapping[str, float]) -> bool:
        """Whether these rows, of a larger minibatch, have the gradient that was begun."""
        mine, other = self.batch, rows.denom
        counts = (mine.denom.expert_tokens, mine.denom.expert_rows)
        return (
            (loss, coefs) == (self.loss, self.coefs)
            and counts == (other.expert_tokens, other.expert_rows)
            and torch.equal(mine.row_starts, rows.row_starts)
            and all(
                torch.equal(getattr(mine, name), getattr(rows, name))
                for name in ("input_ids", "source", "weights", "advantages")
            )
        )


class LearnerGroup:
    """Implements contracts.Learners over any Ranks."""

    def __init__(
        self,
        ranks: Ranks,
        config: LearnerConfig,
        needs: Mapping[str, frozenset[Need]],
        *,
        total_steps: int,
        seed: int,
        route: WeightRoute,
        advantage_only: Mapping[str, frozenset[Source]] | None = None,
    ) -> None:
        """`advantage_only`: the algorithm's; None computes every row that trains a token."""
        self.ranks, self.config, self.needs = ranks, config, needs
        self.advantage_only = advantage_only or {}
        self.total_steps, self.seed, self.route = total_steps, seed, route
        self._skipped_in_a_row = 0
        self._receivers: list[Any] | None = None
        self._begun: Begun | None = None
        self._one_call = threading.Lock()
        """Rows may begin while the pool brings a new worker to the present weights."""

    def annotate(
        self, batch: TrainBatch, needs: frozenset[Need], *, single: bool, loss: str | None = None
    ) -> TrainBatch:
        """Fill old_logprobs, old_entropy, ref_logprobs, values and the sketch of each row where `needs` names them.

        With `single` (one optimizer step takes the whole batch) old log-probs are the current ones, so no pass is run
        for them alone. Rows that `loss` leaves out get NaN where only the loss would read the columns.
        """
        wanted = needs & {"old_logprobs", "old_entropy", "ref_logprobs", "values", "row_sketch"}
        if "recorded_logprobs" in needs:
            wanted |= {"old_logprobs"}
        elif single and not wanted & {"old_entropy", "row_sketch"}:
            wanted -= {"old_logprobs"}
        if batch.ref_logprobs is not None and not batch.ref_logprobs[batch.trained].isnan().any():
            wanted -= {"ref_logprobs"}
        if not wanted or batch.num_rows == 0:
            return batch
        live = torch.ones(batch.num_rows, dtype=torch.bool)
        if loss is not None and not needs & READ_BEFORE:
            live = has_gradient(batch, self.advantage_only.get(loss, frozenset()))
        columns = self._columns(batch, wanted, live)
        stored = batch.ref_logprobs
        if stored is not None and "ref_logprobs" in columns:
            # What the data stores of a token is the word of whoever wrote the data.
            columns["ref_logprobs"] = columns["ref_logprobs"].where(stored.isnan(), stored)
        return replace(batch, **{k: v.to(batch.advantages.dtype) for k, v in columns.items()})

    def _columns(
        self, batch: TrainBatch, wanted: frozenset[Need], live: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What the ranks answer of the rows `live`, bool [N], in the places of the batch."""
        computed = live.nonzero().squeeze(-1).tolist()
        marked = self._mark(select(batch, computed))
        parts = self._parts(marked).plans
        answers = self._call(
            "annotate", [([select(marked, rows) for rows in plan], wanted) for plan in parts]
        )
        absent = ~live[batch.row_ids]
        columns: dict[str, torch.Tensor] = {}
        for plan, answer in zip(parts, answers, strict=True):
            for rows, column in zip(plan, answer, strict=True):
                rows = [computed[row] for row in rows]
                spans = [torch.arange(*batch.row_starts[row : row + 2].tolist()) for row in rows]
                for name, values in column.items():
                    by_row = name in ROW_FIELDS
                    shape = batch.num_rows if by_row else batch.num_tokens, *values.shape[1:]
                    if name not in columns:
                        columns[name] = torch.zeros(shape)
                        columns[name][~live if by_row else absent] = torch.nan
                    if spans:
                        columns[name][rows if by_row else torch.cat(spans)] = values
        return columns

    def update(
        self,
        batch: TrainBatch,
        update: Update,
        *,
        step: int,
        prepare: PrepareFn | None = None,
        remember: RememberFn | None = None,
    ) -> list[UpdateReport]:
        """Minibatches x epochs optimizer steps over an annotated batch; no rows, no step."""
        if batch.denom.tokens == 0:
            return []
        scheduled = learning_rate(self.config, step, self.total_steps)
        reports = []
        for epoch in range(update.epochs):
            seed = hash((self.seed, step, epoch)) & 0xFFFFFFFF
            seeded = self._mark(self._seed_rows(batch, step, epoch))
            for rows in split_minibatches(batch, update.minibatches, seed):
                minibatch = select(seeded, rows)
                minibatch = replace(minibatch, denom=count(minibatch))
                if minibatch.denom.tokens:
                    minibatch = self._prepare(minibatch, update.loss, update.coefs, prepare)
                    steps = list(self._steps(minibatch, update, scheduled))
                    for report in steps:
                        self._count_skipped(report, step)
                    reports += steps
                    if remember is not None and steps[0].applied:
                        remember(minibatch)
        return reports

    def begin(self, batch: TrainBatch, update: Update) -> None:
        """Each rank accumulates its part; where the update's rows turn out to be others, its step raises."""
        marked = self._mark(batch)
        parts = self._parts(marked)
        cut = [[select(marked, rows) for rows in plan] for plan in parts.plans]
        self._call("begin", [(mine, update.loss, update.coefs) for mine in cut])
        self._begun = Begun(batch, update.loss, update.coefs, sum(parts.tokens))

    def _less_begun(
        self, minibatch: TrainBatch, loss: str, coefs: Mapping[str, float]
    ) -> tuple[TrainBatch, int]:
        """The rows that were not begun, with the denominators of all, and the tokens that the others were."""
        begun, self._begun = self._begun, None
        if begun is None:
            return minibatch, 0
        policy = torch.zeros(minibatch.num_rows, dtype=torch.bool)
        policy[minibatch.row_ids[minibatch.source == Source.POLICY]] = True
        first = select(minibatch, (~policy).nonzero().squeeze(-1).tolist())
        if not begun.is_same(first, loss, coefs):
            raise LearnerError(
                f"update {loss!r} does not hold the rows that were begun for it (Algorithm.first_rows): it has "
                f"{first.num_rows} rows without policy tokens, {begun.batch.num_rows} were begun"
            )
        return select(minibatch, policy.nonzero().squeeze(-1).tolist()), begun.tokens

    def _call(self, method: str, per_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        with self._one_call:
            return self.ranks.call(method, per_rank)

    def _count_skipped(self, report: UpdateReport, step: int) -> None:
        """Raises LearnerError where `learner.max_skipped_updates` in a row were left out."""
        self._skipped_in_a_row = 0 if report.applied else self._skipped_in_a_row + 1
        if self._skipped_in_a_row < self.config.max_skipped_updates:
            return
        names = report.prompts
        some = ", ".join(names[:PROMPTS_SHOWN]) + (", ..." if len(names) > PROMPTS_SHOWN else "")
        raise LearnerError(
            f"{report.skipped} not finite in update {report.loss_name!r} of step {step + 1}, on {len(names)} prompts "
            f"({some}); {self._skipped_in_a_row} optimizer steps in a row were left out "
            f"(learner.max_skipped_updates). {REMEDY}"
        )

    def _steps(
        self, minibatch: TrainBatch, update: Update, scheduled: float
    ) -> Iterator[UpdateReport]:
        """The update's own optimizer step, then the critic's where it has one."""
        rate = update.learning_rate
        rate = scheduled if rate is None else rate
        yield self._step(minibatch, update.loss, update.coefs, rate, update.optimizer)
        if update.critic_loss is not None:
            rate = update.critic_learning_rate
            rate = scheduled if rate is None else rate
            yield self._step(minibatch, update.critic_loss, update.coefs, rate, "main")

    def compare_gradients(
        self, probes: Sequence[GradientProbe], *, step: int, prepare: PrepareFn | None = None
    ) -> GradientComparison:
        """Each probe's batch is cut over ranks and micro-batches as a step of one minibatch would cut it.

        Raises LearnerError after `begin`, whose gradient would be in all of them.
        """
        if self._begun is not None:
            raise LearnerError("gradients cannot be measured between `begin` and the update")
        per_rank: list[list[Any]] = [[] for _ in range(self.ranks.world_size)]
        for probe in probes:
            batch = self._mark(self._seed_rows(probe.batch, step, epoch=0))
            batch = self._prepare(batch, probe.loss, probe.coefs, prepare)
            batch = self._with_gradient(batch, probe.loss)
            for calls, plan in zip(per_rank, self._parts(batch).plans, strict=True):
                micro_batches = [select(batch, rows) for rows in plan]
                calls.append((micro_batches, probe.loss, probe.coefs, probe.only))
        answers = self._call("compare_gradients", [(calls,) for calls in per_rank])
        gram, metrics = answers[0]
        names = tuple(probe.name for probe in probes)
        return GradientComparison(names, tuple(map(tuple, gram)), tuple(metrics))

    def _seed_rows(self, batch: TrainBatch, step: int, epoch: int) -> TrainBatch:
        if batch.row_seeds is None:
            return batch
        return replace(batch, row_seeds=batch.row_seeds ^ seed_of(self.seed, step, epoch))

    def _prepare(
        self,
        minibatch: TrainBatch,
        loss: str,
        coefs: Mapping[str, float],
        prepare: PrepareFn | None,
    ) -> TrainBatch:
        if prepare is None:
            return minibatch
        return prepare(minibatch, self._current_logprobs(minibatch, loss), coefs)

    def _current_logprobs(self, minibatch: TrainBatch, loss: str) -> torch.Tensor | None:
        """A no-grad pass for losses whose minibatch-wide statistics depend on the present weights."""
        if "minibatch_stats" not in self.needs[loss]:
            return None
        return self.annotate(minibatch, frozenset({"old_logprobs"}), single=False).old_logprobs

    def _step(
        self,
        minibatch: TrainBatch,
        loss: str,
        coefs: Mapping[str, float],
        rate: float,
        optimizer: str,
    ) -> UpdateReport:
        rest, begun_tokens = self._less_begun(minibatch, loss, coefs)
        live = self._with_gradient(rest, loss)
        parts = self._parts(live)
        report = self._call(
            "step",
            [
                ([select(live, rows) for rows in plan], loss, coefs, rate, optimizer)
                for plan in parts.plans
            ],
        )[0]
        policy = int(minibatch.is_trained(Source.POLICY).sum())
        trained = {"policy": policy, "expert": int(minibatch.is_trained(Source.EXPERT).sum())}
        if report.model == "critic":
            trained = {"critic": policy}
        computed = sum(parts.tokens) + begun_tokens
        tokens = {**trained, "computed": computed, "left_out": rest.num_tokens - live.num_tokens}
        facts: dict[str, float] = {
            "left_out_rows": rest.num_rows - live.num_rows,
            "rank_imbalance": parts.imbalance,
        }
        if "old_logprobs" in self.needs[loss]:
            facts["old_logprobs_recorded"] = float(minibatch.old_logprobs is not None)
        return replace(
            report,
            tokens=tokens,
            metrics={**report.metrics, **coefs, **facts},
            prompts=trained_prompts(minibatch),
        )

    def _with_gradient(self, batch: TrainBatch, loss: str) -> TrainBatch:
        return with_gradient(batch, self.advantage_only.get(loss, frozenset()))

    def _mark(self, batch: TrainBatch) -> TrainBatch:
        return mark_prefixes(batch) if self.config.shares_prefixes else batch

    def _parts(self, batch: TrainBatch) -> Partition:
        return partition(batch, self.ranks.world_size, self.config.max_tokens_per_micro_batch)

    def _all(self, method: str, *args: Any) -> list[Any]:
        return self._call(method, [args] * self.ranks.world_size)

    def refresh_reference(self) -> None:
        self._all("refresh_reference")

    def connect(self, receivers: Sequence[Any]) -> None:
        """Does nothing where it is these already."""
        if list(receivers) != self._receivers:
            self._receivers = None
            self._all("connect", list(receivers), self.route)
            self._receivers = list(receivers)

    def send_weights(self, version: int) -> Mapping[str, str]:
        return self._all("send_weights", version)[0]

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> Sequence[Sequence[float]]:
        return self._all("logprobs", sequences)[0] if sequences else []

    def save(self, folder: str) -> None:
        self._all("save", folder)

    def saved(self, *, wait: bool) -> list[FileRecord] | None:
        records = self._all("saved", wait)
        return None if any(record is None for record in records) else records

    def load(self, paths: Sequence[str]) -> None:
        self._all("load", list(paths))

    def export(self, folder: str) -> None:
        self._all("export", folder)

    def restart(self) -> None:
        self._receivers, self._skipped_in_a_row, self._begun = None, 0, None
        self.ranks.restart()

    def status(self) -> Sequence[Mapping[str, Any]]:
        return self.ranks.status()

    def close(self) -> None:
        self.ranks.close()


def trained_prompts(batch: TrainBatch) -> tuple[str, ...]:
    """Ids of the prompts that have a row with a trained token."""
    rows = batch.row_ids[batch.trained].unique().tolist()
    return tuple(dict.fromkeys(batch.group_names[row] for row in rows))
