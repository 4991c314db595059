"""What an algorithm asks of the data's demonstrations, checked on every row before a worker starts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from ..algorithms import AlgorithmBase
from ..algorithms.expert_base import ExpertLossBase
from ..algorithms.stages import Stages
from ..engine.errors import ConfigError, DataError
from ..engine.types import TOKEN_COLUMNS
from ..rollouts.records import Record
from ..rollouts.split import pick

IDS_SHOWN = 3
COMPUTABLE = frozenset({"ref_logprobs"})
"""Columns that the run computes itself where the data has none."""


def check_demonstrations(
    algorithm: AlgorithmBase, records: Sequence[Record], *, graded: bool
) -> None:
    """Refuse data without the demonstrations that the algorithm trains, or without what it reads of them.

    `graded`: the run has a reward, which scores the demonstrations that the data stores no score of.
    """
    if isinstance(algorithm, Stages):
        for member in algorithm.members:
            check_demonstrations(member, records, graded=graded)
        return
    refuse_unknown_of_own_responses(algorithm)
    needs = frozenset[str]().union(*algorithm.needs.values())
    if "pairs" in needs and not any(record.rejected for record in records):
        raise DataError(
            f"algorithm.expert_loss.type = {algorithm.config.expert_loss.kind!r} compares demonstrations with rejected "
            f"responses, but none of the {len(records)} data rows has one; fill the column data.columns.rejected of "
            "jsonl or huggingface data, or choose an expert loss without pairs, for example nll"
        )
    if "demonstrations" not in needs:
        return
    shown = with_demonstration(records)
    name = algorithm.config.type
    if not len(shown):
        raise DataError(
            f"algorithm.type = {name!r} trains demonstrations, but none of the {len(records)} data rows has one; "
            "fill the demonstration column (data.columns.demonstration, or data.demonstrations), "
            "or choose an algorithm without them, for example grpo"
        )
    if algorithm.every_prompt_demonstrated and len(shown) < len(records):
        without = (record.prompt_id for record in records if not record.demonstrations)
        raise DataError(
            f"algorithm.type = {name!r} trains the demonstration of every prompt, but {len(records) - len(shown)} of "
            f"{len(records)} data rows have none, for example {', '.join(map(repr, islice(without, IDS_SHOWN)))}; "
            "remove those rows"
        )
    if algorithm.expert_loss is not None:
        check_expert_loss(algorithm.expert_loss, shown, graded=graded)


def refuse_unknown_of_own_responses(algorithm: AlgorithmBase) -> None:
    """Raises ConfigError where the expert loss reads what the data stores of a row, and rows were just sampled."""
    loss = algorithm.expert_loss
    if loss is None or not algorithm.trains_own_responses:
        return
    stored = sorted(loss.needs & ({*TOKEN_COLUMNS} - COMPUTABLE))
    if stored or loss.remembers:
        raise ConfigError.at(
            "algorithm.expert_loss.type",
            loss.kind,
            f"reads {', '.join(stored) or 'earlier visits'} of its rows, which solutions that were just sampled by "
            f"{algorithm.config.type} do not have; choose another",
        )


def check_pairs_fit(algorithm: AlgorithmBase, data: Any, max_response: int, budget: int) -> None:
    """Refuse prompts whose compared responses would not fit into one micro-batch together."""
    if not any("pairs" in needs for needs in algorithm.needs.values()):
        return
    long = {name: n for name, n in data.pair_tokens(max_response).items() if n > budget}
    if long:
        shown = ", ".join(f"{name!r} ({n} tokens)" for name, n in [*long.items()][:IDS_SHOWN])
        raise DataError(
            f"{len(long)} prompts have more chosen and rejected tokens than learner.max_tokens_per_micro_batch = "
            f"{budget}, for example {shown}; raise it, or give these prompts fewer or shorter rejected responses"
        )


def with_demonstration(records: Sequence[Record]) -> Sequence[Record]:
    """Those that have one; they stay where they are, so that data larger than memory can be checked."""
    has = np.fromiter((bool(record.demonstrations) for record in records), bool, len(records))
    return pick(records, np.flatnonzero(has))


def check_expert_loss(loss: ExpertLossBase, records: Sequence[Record], *, graded: bool) -> None:
    """Refuse rows that lack a column or a score that the expert loss reads."""
    reader = f"expert_loss.type = {loss.kind!r}"
    check_columns(reader, loss.needs, records)
    if "demonstration_scores" not in loss.needs or graded:
        return
    unscored = [r.prompt_id for r in records if not r.scores or None in r.scores]
    if unscored:
        raise DataError(
            f"{reader} reads the score of each demonstration, but {len(unscored)} of {len(records)} rows with a "
            f"demonstration have none, for example {', '.join(map(repr, unscored[:IDS_SHOWN]))}; fill the column "
            "data.columns.demonstration_score, or name a reward that grades them"
        )


def check_columns(reader: str, needs: frozenset[str], records: Sequence[Record]) -> None:
    """Raises DataError naming every column that `reader` needs and some demonstration lacks."""
    problems = []
    for column in TOKEN_COLUMNS:
        if column not in needs - COMPUTABLE:
            continue
        lacking = [record.prompt_id for record in records if not has_column(record, column)]
        if lacking:
            problems.append(
                f"  {column}: {len(lacking)} of {len(records)} rows with a demonstration lack it, for example "
                f"{', '.join(map(repr, lacking[:IDS_SHOWN]))}"
            )
    if problems:
        raise DataError(
            "\n".join(
                [
                    f"{reader} reads columns that the data lacks:",
                    *problems,
                    "give each row the column (data.columns names it; only data.type jsonl and huggingface have "
                    "columns), or choose an expert loss that needs none: docs/expert-losses.md",
                ]
            )
        )


def has_column(record: Record, column: str) -> bool:
    """Whether every demonstration of the row has it."""
    found = record.columns.get(column, ())
    return len(found) == len(record.demonstrations) and None not in found
