"""Steps of the real loop around workers that compute nothing: pool, journal, assembly, learner calls, weight sync."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from idle_workers import IdleLearner, IdleWorker
from loop_run import LoopRun
from plait.algorithms import Setup
from plait.algorithms.grpo import Grpo, GrpoConfig
from plait.engine import ray_ranks
from plait.engine.config import LearnerConfig
from plait.engine.learner import WeightRoute
from plait.engine.learners import LearnerGroup
from plait.engine.ray_ranks import RayRanks
from plait.engine.types import Prompt, Rollout, RolloutGroup, RolloutRequest, Sampling, Score
from plait.rewards.groups import ExpectedGroups
from plait.rollouts import pool as pools
from plait.rollouts.config import RolloutConfig
from plait.rollouts.pool import Pool

GROUP_SIZE = 4
SAMPLING = Sampling(64)
PROMPT_TOKENS = 64


class Stream:
    """Endless prompts."""

    eval_prompts: Sequence[Prompt] = ()

    def __init__(self) -> None:
        self.position = 0

    def take(self, n: int) -> list[Prompt]:
        self.position += n
        ids = range(self.position - n, self.position)
        return [Prompt(f"p/{i}", (), tuple(range(3, 3 + PROMPT_TOKENS))) for i in ids]

    def take_experts(self, n: int) -> Sequence[Prompt]:
        return ()

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        """The order of prompts does not depend on them."""

    def metrics(self) -> Mapping[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


class ParityScorer:
    """Scores at once, in this process; no group is uniform for long."""

    last: Sequence[RolloutGroup] = ()
    """What was scored last."""

    def score(
        self,
        requests: Sequence[RolloutRequest],
        rollouts: Iterable[Rollout],
        earlier: Sequence[RolloutGroup] = (),
        *,
        num_groups: int | None = None,
    ) -> list[RolloutGroup]:
        groups, scores = ExpectedGroups(requests), {}
        for rollout in rollouts:
            groups.admit(rollout)
            scores[rollout.prompt_id, rollout.index] = Score.ok(float(rollout.token_ids[0] % 2))
        groups.check_complete(num_groups)
        self.last = groups.grouped(scores)
        return [*self.last]


@contextmanager
def idle_ranks(num_workers: int = 1, env: Mapping[str, str] | None = None) -> Iterator[RayRanks]:
    """Ray is up."""
    real, ray_ranks.RemoteLearner = ray_ranks.RemoteLearner, IdleLearner  # type: ignore[misc]
    config = LearnerConfig(num_workers=num_workers)
    ranks = RayRanks("none", config, {}, {}, env or {})
    try:
        ranks.wait_started()
        yield ranks
    finally:
        ranks.close()
        ray_ranks.RemoteLearner = real  # type: ignore[misc]


@contextmanager
def idle_pool(num_workers: int) -> Iterator[Pool]:
    """Ray is up. RolloutError where the workers do not start in time."""
    real, pools.RolloutWorker = pools.RolloutWorker, IdleWorker  # type: ignore[misc]
    config = RolloutConfig(
        num_workers=num_workers, max_prompt_length=128, max_response_length=64, max_num_seqs=8
    )
    pool = Pool("none", config, dtype="float32", seed=0)
    try:
        pool.wait_started()
        yield pool
    finally:
        pool.close()
        pools.RolloutWorker = real  # type: ignore[misc]


def idle_loop(
    folder: Path,
    pool: Pool,
    ranks: RayRanks,
    num_prompts: int,
    staleness: Literal[0, 1] = 0,
    extra_prompts: int = 0,
) -> LoopRun:
    config = GrpoConfig(rollouts_per_prompt=GROUP_SIZE, sampler_ratio_cap=2.0)
    algorithm = Grpo(config, Setup(SAMPLING))
    route = WeightRoute("shared_memory", "float32", 60.0)
    learners = LearnerGroup(
        ranks, LearnerConfig(), algorithm.needs, total_steps=10**9, seed=0, route=route
    )
    parts = {"data": Stream(), "rollouts": pool, "scorer": ParityScorer(), "learners": learners}
    ahead = {"staleness": staleness, "extra_prompts": extra_prompts}
    return LoopRun(folder, algorithm, SAMPLING, num_prompts, **ahead, **parts)


def step_seconds(
    folder: Path, ranks: RayRanks, num_workers: int, num_prompts: int, steps: int, warm: int = 5
) -> list[float]:
    """Of `steps` steps with so many rollout workers; the first ones are not counted."""
    with idle_pool(num_workers) as pool:
        run = idle_loop(folder / f"{num_workers}-workers", pool, ranks, num_prompts)
        try:
            return [run.step() for _ in range(warm + steps)][warm:]
        finally:
            run.close()
