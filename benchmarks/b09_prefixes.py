"""B9: how often a prompt and its expert prefixes are computed, and what expert tokens cost beside policy tokens.

Prefill: 8 prompts with 3 nested prefixes each, 8 samples of each; vLLM says how many tokens of each request came from
its cache. Price: one optimizer step on policy rows with and without expert rows of the same shape; what these add, in
units of what as many policy tokens cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray

from figures import at_most
from harness import Session, Side, Work
from plait.algorithms import Setup
from plait.algorithms.chord import Chord, ChordConfig
from plait.engine.batch import collate
from plait.engine.types import Prompt, RolloutRequest, Sample, Sampling, Source, Update
from plait.launch.cluster import ray_cluster
from plait.rollouts import pool as pools
from plait.rollouts.config import RolloutConfig
from plait.rollouts.pool import Pool
from plait.rollouts.worker import RolloutWorker
from shapes import HIGH, LOW, learner_group, make_groups, small_model
from tiny_model import make_tiny_model

PROMPTS, GROUP_SIZE, PROMPT_TOKENS, PREFIXES = 8, 8, 500, (0, 120, 240)
SHAPE = {"num_prompts": 2, "group_size": 8, "prompt_tokens": 32, "lengths": [16, 24, 32, 56]}


class CountingWorker(RolloutWorker):
    """Counts the prompt tokens that its engine computed."""

    computed = 0

    async def _request(self, tokens: Any, params: Any, what: str) -> Any:
        output = await super()._request(tokens, params, what)
        self.computed += len(tokens) - output.num_cached_tokens
        return output

    async def count(self) -> int:
        return self.computed


def make_requests(seed: int) -> list[RolloutRequest]:
    rng = np.random.default_rng(seed)
    requests = []
    for i in range(PROMPTS):
        tokens = rng.integers(LOW, HIGH, PROMPT_TOKENS + max(PREFIXES)).tolist()
        prompt = Prompt(f"{seed}/{i}", (), tuple(tokens[:PROMPT_TOKENS]))
        for place, length in enumerate(PREFIXES):
            prefix = tuple(tokens[PROMPT_TOKENS : PROMPT_TOKENS + length])
            sampling = Sampling(length + 4)
            first = place * GROUP_SIZE
            requests.append(RolloutRequest(prompt, GROUP_SIZE, sampling, prefix, first))
    return requests


def measure(session: Session) -> None:
    with TemporaryDirectory() as folder:
        measure_price(session, Path(folder))
        measure_prefill(session, Path(folder))


def prefilled(worker: Any) -> int:
    count: Any = ray.get(worker.count.remote())
    return count


def measure_prefill(session: Session, folder: Path) -> None:
    model = make_tiny_model(folder / "tiny", heads=2, kv_heads=1)
    config = RolloutConfig(max_prompt_length=512, max_response_length=256, kv_cache_gib=1.0)
    real, pools.RolloutWorker = pools.RolloutWorker, CountingWorker  # type: ignore[misc]
    ratios = []
    with ray_cluster():
        pool = Pool(str(model), config, dtype="float32", seed=0)
        try:
            pool.wait_started()
            (worker,) = pool.receivers()
            for seed in range(2 if session.quick else 5):
                before = prefilled(worker)
                list(pool.generate(make_requests(seed), step=0))
                computed = prefilled(worker) - before
                ratios.append(computed / (PROMPTS * (PROMPT_TOKENS + max(PREFIXES))))
        finally:
            pool.close()
            pools.RolloutWorker = real  # type: ignore[misc]
    longest = PROMPT_TOKENS + max(PREFIXES)
    asked = sum(GROUP_SIZE * (PROMPT_TOKENS + length) for length in PREFIXES)
    session.derive(
        "prefill tokens computed / unique prompt and prefix tokens",
        ratios,
        target=at_most(1.05),
        note=f"prompts of {PROMPT_TOKENS} tokens, prefixes of {PREFIXES}, groups of {GROUP_SIZE}; "
        f"without any reuse {asked / longest:.1f}",
    )


def as_expert(row: Sample, index: int) -> Sample:
    source = np.where(row.source == Source.POLICY, Source.EXPERT, row.source).astype(np.int8)
    unknown = np.full(len(row), np.nan, np.float32)
    return replace(
        row,
        source=source,
        advantages=np.zeros_like(row.advantages),
        rollout_logprobs=unknown,
        group_id=f"expert {index}",
        reward=None,
    )


def measure_price(session: Session, folder: Path) -> None:
    algorithm = Chord(ChordConfig(), Setup(Sampling(64)))
    model = small_model(folder / "small")
    learners = learner_group(model, algorithm, max_tokens_per_micro_batch=1024)
    policy = make_groups(0, **SHAPE)
    experts = [as_expert(row, i) for i, row in enumerate(make_groups(1, **SHAPE))]

    def side(name: str, rows: Sequence[Sample]) -> Side:
        def run(number: int) -> Any:
            return learners.update(collate(rows), Update(tuple(rows), "main", {"mu": 0.5}), step=0)

        def prove(number: int, reports: Any) -> Work:
            assert reports[0].applied, reports
            return Work.of(row.token_ids.tolist() for row in rows if Source.POLICY in row.source)

        return Side(name, run, prove)

    tokens, extra = sum(map(len, policy)), sum(map(len, experts))
    session.compare(
        "price of an expert token / of a policy token",
        side("policy rows", policy),
        side("policy and expert rows", [*policy, *experts]),
        target=at_most(1.05),
        value=lambda alone, both: (both - alone) / alone * tokens / extra,
        seconds=130,
        note=f"{tokens} policy-row tokens, {extra} expert-row tokens of the same shape, 20 million parameters",
    )
