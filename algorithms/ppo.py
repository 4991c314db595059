"""PPO, proximal policy optimization with a critic (arXiv 1707.06347).

Objective `main`: clipped surrogate over POLICY tokens - entropy_coef x entropy + kl_coef x KL, as grpo, with an
advantage for each token from generalized advantage estimation. Objective `critic`: clipped squared error of the value
before each POLICY token.

The critic is a transformer of its own (engine/critic.py). Values are taken before the first update of a step; each
minibatch moves the policy, then the critic.

Departs from common code: truncated rows are not bootstrapped; whitening takes ddof 1 and epsilon 1e-6; a KL penalty in
the reward (`reward_kl_coef`) is off by default, the KL component in the loss is the usual way here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from pydantic import Field

from ..engine.contracts import LossFn, Need
from ..engine.types import (
    LossOutput,
    PolicyOutput,
    RolloutGroup,
    Sample,
    Source,
    StepPlan,
    TrainBatch,
    Update,
)
from .base import (
    AlgorithmBase,
    Setup,
    SurrogateFields,
    drop_uniform,
    rollout_rows,
    surrogate_needs,
    surrogate_only,
)
from .gae import estimate_gae, explained_variance, whiten
from .grpo import grpo_loss
from .losses import Members


class PpoConfig(SurrogateFields):
    type: Literal["ppo"] = "ppo"
    discount: float = Field(default=1.0, ge=0, le=1)
    """gamma in papers."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    whiten_advantages: bool = True
    """Standardize advantages over all trained POLICY tokens of the step."""
    advantage_epsilon: float = Field(default=1e-6, gt=0)
    reward_kl_coef: float = Field(default=0.0, ge=0)
    """Each token's reward is lowered by this times (old_logprobs - ref_logprobs)."""
    value_clip: float | None = Field(default=0.2, ge=0)
    """How far a value may move from what it was before the step until its error stops counting; null: off."""
    critic_learning_rate: float = Field(default=1e-5, gt=0)
    """Fixed; learner.schedule is the policy's."""
    critic_warmup_steps: int = Field(default=0, ge=0)
    """In the first steps of a run only the critic trains."""


def value_loss(
    out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float], *, config: PpoConfig
) -> LossOutput:
    """Mean over POLICY tokens of 0.5 max((v - R)^2, (clip(v, v_old +- value_clip) - R)^2); ties take the first.

    v = out.values, v_old = batch.values, R = batch.returns, all [T].
    """
    if out.values is None or batch.values is None or batch.returns is None:
        raise ValueError("the value loss needs values, new_values and the returns that finish sets")
    members = Members.policy(batch)
    values = out.values.where(members.mask, 0.0)
    old, returns = (column.where(members.mask, 0.0) for column in (batch.values, batch.returns))
    error = (values - returns) ** 2
    clipped = members.mask & False
    if config.value_clip is not None:
        bounded = values.clamp(old - config.value_clip, old + config.value_clip)
        bounded_error = (bounded - returns) ** 2
        clipped = bounded_error > error
        error = bounded_error.where(clipped, error)
    loss = members.normalize(0.5 * error, batch, config.normalizer, config.max_response_length)
    metrics = {"value_loss": loss.detach()}
    if members.tokens:
        metrics["value_clip_fraction"] = members.mean(clipped.to(error.dtype))
    return LossOutput(loss, metrics)


class Ppo(AlgorithmBase):
    Config = PpoConfig

    def __init__(self, config: PpoConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.explained_variance: float | None = None

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {
            "main": partial(grpo_loss, config=self.config),
            "critic": partial(value_loss, config=self.config),
        }

    @property
    def advantage_only(self) -> Mapping[str, frozenset[Source]]:
        return surrogate_only(self.config, Source.POLICY)

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        credit = frozenset[Need]({"values"})
        if self.config.reward_kl_coef > 0:
            credit |= frozenset[Need]({"recorded_logprobs", "ref_logprobs"})
        return {
            "main": surrogate_needs(self.config) | credit,
            "critic": credit | frozenset[Need]({"new_values"}),
        }

    def credit(self, samples: Sequence[Sample]) -> list[Sample]:
        """Rows as they are: advantages need the critic's values, see `finish`."""
        return drop_uniform(samples, self.config)

    def assemble(
        self, plan: StepPlan, groups: Sequence[RolloutGroup], step: int
    ) -> Sequence[Update]:
        update = self.update(self.credit(rollout_rows(groups)), self.coefs(step))
        rate = self.config.critic_learning_rate
        if step < self.config.critic_warmup_steps:
            return [replace(update, loss="critic", learning_rate=rate)]
        return [replace(update, critic_loss="critic", critic_learning_rate=rate)]

    def finish(self, batch: TrainBatch) -> TrainBatch:
        """Token advantages and returns of the whole step."""
        if batch.num_rows == 0:
            return batch
        config, members = self.config, batch.is_trained(Source.POLICY)
        advantages, returns = estimate_gae(
            batch, token_penalties(batch, config), config.discount, config.gae_lambda
        )
        assert batch.values is not None
        self.explained_variance = explained_variance(batch.values[members], returns[members])
        if config.whiten_advantages:
            scored = members & batch.rewards.isfinite()[batch.row_ids]
            advantages[scored] = whiten(advantages[scored], config.advantage_epsilon)
        return replace(batch, advantages=advantages, returns=returns)

    def metrics(self) -> Mapping[str, float]:
        """explained_variance: share of the returns' variance that the values before the step explain."""
        known = self.explained_variance
        return {} if known is None else {"explained_variance": known}


def token_penalties(batch: TrainBatch, config: PpoConfig):
    """[T] -reward_kl_coef (old_logprobs - ref_logprobs) on POLICY tokens, 0 elsewhere."""
    if config.reward_kl_coef == 0:
        return batch.advantages * 0.0
    if batch.old_logprobs is None or batch.ref_logprobs is None:
        raise ValueError("reward_kl_coef > 0 needs old_logprobs and ref_logprobs")
    gap = (batch.old_logprobs - batch.ref_logprobs).where(batch.source == Source.POLICY, 0.0)
    return -config.reward_kl_coef * gap
