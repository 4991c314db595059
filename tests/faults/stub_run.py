"""A run of real DeepSpeed ranks in Ray actors that trains on what stub engines draw from its weights.

A different bit in any weight changes every token that is drawn after it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from plait.algorithms import Setup
from plait.algorithms.grpo import Grpo, GrpoConfig
from plait.engine.checkpoint import Checkpoints
from plait.engine.config import CheckpointConfig, EvalConfig, LearnerConfig, LoopConfig
from plait.engine.journal import Journal
from plait.engine.learner import WeightRoute
from plait.engine.learners import LearnerGroup
from plait.engine.loop import Parts, train
from plait.engine.metrics import RunLog
from plait.engine.ray_ranks import RayRanks
from plait.engine.run_state import RunState
from plait.engine.sync_proof import Tolerance
from plait.engine.types import Prompt, Rollout, RolloutGroup, RolloutRequest, Sampling, Score
from plait.rewards.groups import ExpectedGroups
from plait.rollouts.pool import Pool

STEPS = 6
SAMPLING = Sampling(8)
LEARNER = LearnerConfig(
    num_workers=2,
    num_cpus=1,
    learning_rate=1e-3,
    max_tokens_per_micro_batch=64,
    timeout_seconds=120,
    silence_seconds=3,
)


class Stream:
    """Endless prompts; a position is all of its state."""

    eval_prompts: Sequence[Prompt] = ()

    def __init__(self) -> None:
        self.position = 0

    def take(self, n: int) -> list[Prompt]:
        self.position += n
        return [Prompt(f"p/{i}", (), (3, 4, i)) for i in range(self.position - n, self.position)]

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
    def score(
        self,
        requests: Sequence[RolloutRequest],
        rollouts: Iterable[Rollout],
        earlier: Sequence[RolloutGroup] = (),
    ) -> list[RolloutGroup]:
        groups, scores = ExpectedGroups(requests), {}
        for rollout in rollouts:
            groups.admit(rollout)
            scores[rollout.prompt_id, rollout.index] = Score.ok(float(rollout.token_ids[0] % 2))
        return groups.grouped(scores)


class Listener:
    """A console that keeps what is said, and when."""

    def __init__(self) -> None:
        self.said: list[tuple[float, str]] = []

    def say(self, message: str) -> None:
        self.said.append((time.time(), message))

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


class StubRun:
    """One run folder, with fresh ranks; `env` is theirs."""

    def __init__(
        self, model: Path, folder: Path, pool: Pool, env: Mapping[str, str], **fields: Any
    ):
        algorithm = Grpo(GrpoConfig(rollouts_per_prompt=4), Setup(SAMPLING))
        config = LEARNER.model_copy(update=fields)
        self.ranks = RayRanks(str(model), config, algorithm.losses, algorithm.needs, env)
        self.listener = Listener()
        route = WeightRoute("shared_memory", "float32", 30.0)
        learners = LearnerGroup(
            self.ranks, config, algorithm.needs, total_steps=STEPS, seed=0, route=route
        )
        self.parts = Parts(
            algorithm=algorithm,
            data=cast(Any, Stream()),
            rollouts=pool,
            scorer=cast(Any, ParityScorer()),
            learners=learners,
            checkpoints=Checkpoints(folder / "checkpoints", CheckpointConfig(every=2)),
            log=RunLog(folder, cast(Any, self.listener)),
            probes=(),
            tolerance=Tolerance.for_dtype("float32"),
            journal=Journal(folder / "journal", 0, self.listener.say),
        )

    def train(self, steps: int = STEPS, **loop: Any) -> RunState:
        self.ranks.wait_started()
        config = LoopConfig(steps=steps, prompts_per_step=4, **loop)
        return train(config, EvalConfig(num_prompts=0), SAMPLING, self.parts)

    def close(self) -> None:
        self.parts.log.close()
        self.ranks.close()
