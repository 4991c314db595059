"""`plait check loss`: one gradient, however the minibatch is cut, and on whichever rank a row lies.

Builds one real minibatch of a recipe without a cluster (`loss_batch.py`): a few of its prompts, rollouts sampled in
process from its model, scored by its reward, assembled by its algorithm, annotated and prepared as in a run. Then the
gradient of every loss is computed again and again: padded and packed, in micro-batches of other sizes, on two real
DeepSpeed ranks (processes of this machine, over gloo) under ZeRO 1, 2 and 3, with the expert rows on one rank or both.

Everything is float32 on the CPU, whatever the recipe says: the question is whether sums are divided rightly, and a
wrong divisor is off by far more than the tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from ..engine.batch import select
from ..engine.config import LearnerConfig
from ..engine.errors import ConfigError
from ..engine.packing import units
from ..engine.process_ranks import ProcessRanks
from ..engine.shared_prefix import lay_out, mark_prefixes
from ..engine.types import Source, TrainBatch, UpdateReport
from .config import Recipe
from .loss_batch import Minibatch, Problem, make_problem

TOLERANCE = 1e-6
PACKING_TOLERANCE = 1e-5
"""Padded rows go through another attention kernel, whose rounding differs by about 1e-6."""
NUM_RANKS = 2
Plan = list[list[int]]
"""Rows of each micro-batch of one rank."""


@dataclass(frozen=True)
class Comparison:
    """One way to compute the gradient of one loss, against the same loss on one rank with all rows at once."""

    loss: str
    ranks: int
    zero_stage: int
    packing: bool
    cut: str
    """How rows are dealt to ranks and micro-batches."""
    gradient_difference: float
    """max |g - g0| / max |g0| over all parameters, of the rank where it is largest."""
    loss_difference: float
    """|L - L0| / max(|L0|, 1)."""

    tolerance: float

    @property
    def ok(self) -> bool:
        return max(self.gradient_difference, self.loss_difference) <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """A gradient of 0 has no relative difference: null."""
        known = {k: None if v == inf else v for k, v in asdict(self).items()}
        return {"ok": self.ok, **known}

    def __str__(self) -> str:
        where = f"{self.ranks} rank{'s' * (self.ranks > 1)}, ZeRO {self.zero_stage}"
        rows = "packed" if self.packing else "padded"
        return (
            f"{'ok  ' if self.ok else 'FAIL'}  {self.loss:<8} {where}, {rows}, {self.cut:<34} "
            f"gradient {self.gradient_difference:.1e}  loss {self.loss_difference:.1e}"
        )


@dataclass(frozen=True)
class Report:
    notes: tuple[str, ...]
    """What was built, and what of it is not the recipe's own."""
    comparisons: tuple[Comparison, ...]

    @property
    def ok(self) -> bool:
        return all(comparison.ok for comparison in self.comparisons)

    def to_json(self) -> dict[str, Any]:
        found = [comparison.to_json() for comparison in self.comparisons]
        return {"ok": self.ok, "notes": list(self.notes), "comparisons": found}

    def lines(self) -> list[str]:
        return [
            *self.notes,
            "float32 on the CPU, whatever the recipe says. Reference: 1 rank, all rows at once, packed or padded. "
            "Compared: max |g - g0| / max |g0| over all parameters, |L - L0| / max(|L0|, 1); "
            f"both at most {TOLERANCE:g}, between packed and padded or shared and whole rows {PACKING_TOLERANCE:g}",
            *map(str, self.comparisons),
        ]


def parse_stages(text: str) -> tuple[int, ...]:
    """`1,2,3` -> (1, 2, 3). Raises ConfigError."""
    stages = tuple(int(part) for part in text.split(",") if part.strip() in ("0", "1", "2", "3"))
    if not stages or len(stages) != len(text.split(",")):
        raise ConfigError.at(
            "--zero", text, "name ZeRO stages, separated by commas, for example 1,2,3"
        )
    return stages


def check_loss(
    recipe: Recipe, zero_stages: Sequence[int] = (1, 2, 3), ranks: ProcessRanks | None = None
) -> Report:
    """Compare every loss of the recipe's algorithm; `ranks` are processes to use again, by default new ones."""
    own = ranks or ProcessRanks(NUM_RANKS, recipe.learner.timeout_seconds)
    try:
        problem = make_problem(recipe, local_config(recipe.learner))
        found: list[Comparison] = []
        references = one_rank(problem, found)
        for stage in zero_stages:
            several_ranks(problem, references, own, stage, found)
    finally:
        if ranks is None:
            own.close()
    still = [
        f"{n}: its gradient is 0, so it shows nothing"
        for n in references
        if not largest(references[n][1])
    ]
    return Report((*problem.notes, *still), tuple(found))


def local_config(config: LearnerConfig) -> LearnerConfig:
    """The recipe's learner as one float32 rank on the CPU, padded, all rows in one micro-batch."""
    here = {
        "num_workers": 1,
        "num_cpus": 1,
        "device": "cpu",
        "dtype": "float32",
        "zero_stage": 0,
        "offload_optimizer": False,
        "packing": False,
        "attention": "auto",
        "max_tokens_per_micro_batch": 10**9,
    }
    return config.model_copy(update=here)


Call = tuple[list[TrainBatch], str, Mapping[str, float]]
"""Arguments of LearnerWorker.gradients."""
Answer = tuple[UpdateReport, dict[str, Tensor]]
"""What it returns."""


def whole(minibatch: Minibatch) -> Call:
    return cut(minibatch, [list(range(minibatch.batch.num_rows))])


def cut(minibatch: Minibatch, plan: Plan) -> Call:
    return [select(minibatch.batch, rows) for rows in plan], minibatch.loss, minibatch.coefs


def one_rank(problem: Problem, found: list[Comparison]) -> dict[str, Answer]:
    """Padded and packed, each in micro-batches of every size; returns the packed gradient of each loss."""
    references: dict[str, Answer] = {}
    padded, packed = (problem.config.model_copy(update={"packing": p}) for p in (False, True))
    for config, worker in ((padded, problem.worker), (packed, problem.start(packed))):
        for minibatch in problem.minibatches:
            loss = minibatch.loss
            reference = worker.gradients(*whole(minibatch))
            if config is packed:
                name, before = "all rows at once, against padded", references[loss]
                found.append(compare(loss, config, name, [reference], before, PACKING_TOLERANCE))
                name, answer = "what rows begin with computed once", shared(worker, minibatch)
                if answer is not None:
                    found.append(
                        compare(loss, config, name, [answer], reference, PACKING_TOLERANCE)
                    )
            for name, plan in micro_batchings(together(minibatch.batch)).items():
                answer = worker.gradients(*cut(minibatch, plan))
                found.append(compare(loss, config, name, [answer], reference))
            references[loss] = reference
    return references


def shared(worker: Any, minibatch: Minibatch) -> Answer | None:
    """None where no two rows begin alike."""
    marked = mark_prefixes(minibatch.batch)
    if lay_out(marked) is None:
        return None
    return worker.gradients([marked], minibatch.loss, minibatch.coefs)


def together(batch: TrainBatch) -> Plan:
    """Rows that share a micro-batch, whatever else changes."""
    return [list(unit.rows) for unit in units(batch)]


def several_ranks(
    problem: Problem,
    references: Mapping[str, Answer],
    ranks: ProcessRanks,
    zero_stage: int,
    found: list[Comparison],
) -> None:
    """Rows dealt to the ranks in several ways, each rank with micro-batches of its own sizes."""
    changes = {"packing": True, "zero_stage": zero_stage, "num_workers": NUM_RANKS}
    config = problem.config.model_copy(update=changes)
    ranks.start(*problem.learner(config), **problem.head)
    for minibatch in problem.minibatches:
        for name, rows in placements(minibatch.batch).items():
            plans = even_out([chunks(part, 2 + i) for i, part in enumerate(rows)])
            answers = ranks.call("gradients", [cut(minibatch, plan) for plan in plans])
            reference = references[minibatch.loss]
            found.append(compare(minibatch.loss, config, name, answers, reference))


def micro_batchings(rows: Plan) -> dict[str, Plan]:
    """`rows`: those that must stay together, which are single ones unless the loss compares rows."""
    third = (len(rows) - 1) // 3
    return {
        "micro-batches of 1": chunks(rows, 1),
        "micro-batches of 2": chunks(rows, 2),
        "uneven, out of order, one empty": [
            joined(rows[-1:] + rows[:third]),
            [],
            joined(rows[third:-1]),
        ],
    }


def placements(batch: TrainBatch) -> dict[str, tuple[Plan, Plan]]:
    """Rows of each of two ranks. Rows with expert tokens are apart only where there are any."""
    rows = together(batch)
    expert_rows = batch.row_ids[batch.source == Source.EXPERT].unique().tolist()
    experts = [unit for unit in rows if not set(unit).isdisjoint(expert_rows)]
    found = {"rows dealt in turn": (rows[::2], rows[1::2])}
    if experts:
        found["expert rows on rank 1 only"] = ([i for i in rows if i not in experts], experts)
    found["rank 1 without a row"] = (rows, [])
    return found


def chunks(rows: Plan, size: int) -> Plan:
    """Micro-batches of `size` units each."""
    return [joined(rows[i : i + size]) for i in range(0, len(rows), size)]


def joined(rows: Plan) -> list[int]:
    return [row for unit in rows for row in unit]


def even_out(plans: Sequence[Plan]) -> list[Plan]:
    """Ranks reduce together, so each gets as many micro-batches; what is missing is empty."""
    num = max(1, *(len(plan) for plan in plans))
    return [plan + [[] for _ in range(num - len(plan))] for plan in plans]


def compare(
    loss: str,
    config: LearnerConfig,
    name: str,
    answers: Sequence[Answer],
    reference: Answer,
    tolerance: float = TOLERANCE,
) -> Comparison:
    """`answers`: what `gradients` returned on each rank; the worst rank counts."""
    report0, gradients0 = reference
    loss0 = report0.metrics["loss"]
    apart = [abs(report.metrics["loss"] - loss0) / max(abs(loss0), 1.0) for report, _ in answers]
    return Comparison(
        loss=loss,
        ranks=len(answers),
        zero_stage=config.zero_stage,
        packing=config.packing,
        cut=name,
        gradient_difference=max(difference(found, gradients0) for _, found in answers),
        loss_difference=max(apart),
        tolerance=tolerance,
    )


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """max |g - g0| / max |g0| over all parameters; one without a gradient has 0. Infinite where all of g0 is 0."""
    zero = torch.zeros(())
    names = found.keys() | expected.keys()
    apart = [found.get(n, zero) - expected.get(n, zero) for n in names]
    scale = largest(expected)
    return max(float(a.abs().max()) for a in apart) / scale if scale else inf


def largest(gradients: Mapping[str, Tensor]) -> float:
    return max((float(g.abs().max()) for g in gradients.values()), default=0.0)
