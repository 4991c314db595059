"""Models, rows and learners that several benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plait.engine.types import Sample, Source
from tiny_model import make_tiny_model

VOCABULARY = 32_768
LOW, HIGH = 259, 320
"""Token ids that rows are made of; every vocabulary has them, and none ends a response."""


def small_model(folder: Path) -> Path:
    """20 million random weights: large enough that a step is arithmetic, small enough for twenty pairs."""
    return make_tiny_model(folder, vocab_size=VOCABULARY, hidden=384, layers=6, heads=6, kv_heads=2)


def make_row(
    rng: np.random.Generator,
    prompt: Sequence[int],
    length: int,
    group: str,
    source: Source = Source.POLICY,
) -> Sample:
    """`length` trained tokens of `source` after a prompt."""
    n = len(prompt) + length
    response = rng.integers(LOW, HIGH, length)
    sources = np.full(n, source, np.int8)
    sources[: len(prompt)] = Source.CONTEXT
    trained = sources != Source.CONTEXT
    policy = trained & (source == Source.POLICY)
    return Sample(
        token_ids=np.concatenate([prompt, response]).astype(np.int32),
        source=sources,
        advantages=np.where(policy, rng.normal(), 0).astype(np.float32),
        weights=np.ones(n, np.float32),
        rollout_logprobs=np.where(policy, -5.0, np.nan).astype(np.float32),
        group_id=group,
        reward=None if source == Source.EXPERT else 1.0,
    )


def make_groups(
    seed: int, num_prompts: int, group_size: int, prompt_tokens: int, lengths: Sequence[int]
) -> list[Sample]:
    """Policy rows of `num_prompts` groups; row i has lengths[i % len(lengths)] response tokens."""
    rng = np.random.default_rng(seed)
    rows: list[Sample] = []
    for p in range(num_prompts):
        prompt = rng.integers(LOW, HIGH, prompt_tokens).tolist()
        for _ in range(group_size):
            length = lengths[len(rows) % len(lengths)]
            rows.append(make_row(rng, prompt, length, f"p{p}"))
    return rows


def lengths_like_answers(seed: int, num: int, mean: float, cap: int) -> list[int]:
    """Log-normal with sigma 1, as responses of a model are; at least 1."""
    rng = np.random.default_rng(seed)
    drawn = rng.lognormal(np.log(mean) - 0.5, 1.0, num)
    return [int(n) for n in drawn.clip(1, cap).round()]


def learner_group(model: Path, algorithm: Any, **fields: Any) -> Any:
    """One rank in this process; `fields` of LearnerConfig."""
    from plait.engine.config import LearnerConfig
    from plait.engine.learner import LearnerWorker, Rank, WeightRoute
    from plait.engine.learners import InProcessRank, LearnerGroup

    config = LearnerConfig(**fields)
    worker = LearnerWorker(str(model), config, algorithm.losses, algorithm.needs, Rank())
    route = WeightRoute("shared_memory", config.dtype, 120.0)
    return LearnerGroup(
        InProcessRank(worker), config, algorithm.needs, total_steps=10**6, seed=0, route=route
    )
