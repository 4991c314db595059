"""Random rows of both sources, ragged, for learner tests."""

from __future__ import annotations

import numpy as np

from plait.engine.types import Sample, Source


def make_row(rng: np.random.Generator, kind: str, index: int, vocabulary: int = 300) -> Sample:
    """kind: p policy, e expert, h hybrid (two expert tokens first)."""
    context, response = int(rng.integers(2, 6)), int(rng.integers(3, 14))
    n = context + response
    source = np.full(n, Source.EXPERT if kind == "e" else Source.POLICY, dtype=np.int8)
    source[:context] = Source.CONTEXT
    if kind == "h":
        source[context : context + 2] = Source.EXPERT
    policy = source == Source.POLICY
    return Sample(
        token_ids=rng.integers(3, vocabulary, n).astype(np.int32),
        source=source,
        advantages=np.where(policy, rng.normal(), 0).astype(np.float32),
        weights=np.ones(n, dtype=np.float32),
        rollout_logprobs=np.where(policy, -5.5, np.nan).astype(np.float32),
        group_id=f"{'expert' if kind == 'e' else 'group'}{index // 2}",
        reward=None if kind == "e" else float(index % 2),
    )


def make_rows(kinds: str, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [make_row(rng, kind, i) for i, kind in enumerate(kinds)]
