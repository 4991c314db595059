"""ViSurf: the label as an extra member of the group (arXiv 2510.10606).

Objective: surrogate over POLICY tokens and EXPERT tokens alike, one denominator, - entropy_coef x entropy + kl_coef x
KL. Old log-probs of the demonstration are those of the policy before the update, as for rollouts.

`expert_rows_per_group` demonstrations join the `rollouts_per_prompt` rollouts. Smoothing: where the best rollout is as
good as the demonstration, the latter's reward becomes the mean rollout reward and its advantage exactly 0. Then the
advantage is taken over the union.

A demonstration has the reward that the verifier gives its text; one whose score is UNKNOWN, or whose group has no
scored rollout, is left out. Prompts without demonstration get rollouts only.

Departs from the paper: it leaves the convention of the std and the demonstration's old log-prob open, so both are ours;
there is no format reward for the demonstration, aligning its text is the data set's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Literal

from pydantic import Field

from ..engine.contracts import LossFn
from ..engine.ledger import ExpertLedger
from ..engine.types import (
    LossOutput,
    PolicyOutput,
    Sample,
    Source,
    TrainBatch,
    Update,
)
from .base import (
    PolicyFields,
    Setup,
    credit_groups,
    surrogate_only,
)
from .grpo import regularize
from .losses import Members, Normalizer, policy_component
from .luffy import DemonstratedGroups
from .step_size import StepSize


class VisurfConfig(PolicyFields):
    type: Literal["visurf"] = "visurf"
    expert_rows_per_group: int = Field(default=1, ge=1)
    """Demonstrations in addition to `rollouts_per_prompt`, where the prompt has them."""
    smooth_expert_reward: bool = True
    normalizer: Normalizer = "rows"


def smoothed_reward(expert_reward: float, rollout_rewards: Sequence[float]) -> float | None:
    """Mean rollout reward where the best rollout is as good as the demonstration; None: keep the reward."""
    if not rollout_rewards or max(rollout_rewards) < expert_reward:
        return None
    # Exactly equal rewards must stay so: a group without signal has advantages of exactly 0.
    best = max(rollout_rewards)
    return best if min(rollout_rewards) == best else fmean(rollout_rewards)


def is_expert(sample: Sample) -> bool:
    return bool((sample.source == Source.EXPERT).any())


def visurf_loss(
    out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float], *, config: VisurfConfig
) -> LossOutput:
    """Surrogate over all trained tokens plus regularizers; out.logprobs and out.entropy are [T]."""
    policy, metrics = policy_component(out, batch, config, Members.all(batch))
    experts = Members.expert(batch)
    if experts.tokens:
        metrics["expert_advantage_mean"] = experts.mean(batch.advantages)
    regularizers, more = regularize(out, batch, config)
    return LossOutput(policy + regularizers, {**metrics, **more})


class Visurf(DemonstratedGroups):
    Config = VisurfConfig

    def __init__(self, config: VisurfConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.smoothed_share: float | None = None

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {"main": partial(visurf_loss, config=self.config)}

    @property
    def advantage_only(self) -> Mapping[str, frozenset[Source]]:
        return surrogate_only(self.config, Source.POLICY, Source.EXPERT)

    def credit(self, samples: Sequence[Sample]) -> list[Sample]:
        """Smooth, then group advantages on POLICY and EXPERT tokens."""
        rewards = self._smoothed_rewards(samples) if self.config.smooth_expert_reward else {}
        labelled = {s.group_id for s in samples if is_expert(s) and s.reward is not None}
        smoothed = {samples[i].group_id for i in rewards}
        self.smoothed_share = len(smoothed) / len(labelled) if labelled else None
        rows = [
            replace(sample, reward=rewards[i], shaping=0.0) if i in rewards else sample
            for i, sample in enumerate(samples)
        ]
        credited = credit_groups(rows, self.config, (Source.POLICY, Source.EXPERT))
        return [
            row.with_advantage(0.0, on=Source.EXPERT) if i in rewards else row
            for i, row in enumerate(credited)
        ]

    def _smoothed_rewards(self, samples: Sequence[Sample]) -> dict[int, float]:
        """New reward of each expert row that is smoothed, by its place."""
        rollouts: dict[str, list[float]] = {}
        for sample in samples:
            if (reward := sample.shaped_reward) is not None and not is_expert(sample):
                rollouts.setdefault(sample.group_id, []).append(reward)
        found: dict[int, float] = {}
        for i, sample in enumerate(samples):
            if (reward := sample.shaped_reward) is not None and is_expert(sample):
                smoothed = smoothed_reward(reward, rollouts.get(sample.group_id, []))
                if smoothed is not None:
                    found[i] = smoothed
        return found

    def ledger(self, updates: Sequence[Update], step: int) -> ExpertLedger:
        """Gate: demonstrated groups whose demonstration was better than their rollouts, and kept its advantage."""
        share = self.smoothed_share
        return ExpertLedger(gate_rate=None if share is None else 1 - share)

    def step_size(self, num_prompts: int, step: int) -> StepSize:
        """Every prompt brings its demonstrations beside the rollouts."""
        size, experts = (
            super().step_size(num_prompts, step),
            num_prompts * self.config.expert_rows_per_group,
        )
        return replace(size, expert_rows=experts, phases=(self.phase(size.rollouts + experts),))

    def metrics(self) -> Mapping[str, float]:
        """smoothed_share: smoothed groups of the last update, of those with a scored demonstration."""
        return {} if self.smoothed_share is None else {"smoothed_share": self.smoothed_share}
