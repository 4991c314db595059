"""GRPO, group relative policy optimization (DeepSeekMath, arXiv 2402.03300), and its relatives as presets.

Objective: clipped surrogate over POLICY tokens - entropy_coef x entropy + kl_coef x KL to the reference.

A preset is a row of values, not a field:

    dr_grpo          advantage: group_mean, normalizer: constant           (arXiv 2503.20783)
    dapo             clip_high: 0.28, normalizer: tokens, drop_uniform_groups: true   (arXiv 2503.14476)
    gspo             ratio_level: sequence, clip_low: 3.0e-4, clip_high: 4.0e-4       (arXiv 2507.18071)
    rloo             advantage: leave_one_out, clips null, normalizer: constant       (arXiv 2402.14740)
    reinforce++      advantage: batch_std (or group_mean_batch_std), normalizer: tokens   (arXiv 2501.03262)

Departs from the papers: KL is a component of its own in the loss, with the same tokens; rloo's sequence sum is divided
by a constant length; reinforce++ standardizes rows, not tokens, and keeps its KL out of the reward.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

from ..engine.contracts import LossFn, Need
from ..engine.types import LossOutput, PolicyOutput, TrainBatch
from .base import AlgorithmBase, PolicyFields, RolloutFields, surrogate_needs
from .losses import Members, Normalizer, entropy_component, kl_component, policy_component


class GrpoConfig(PolicyFields):
    type: Literal["grpo"] = "grpo"
    normalizer: Normalizer = "rows"


def grpo_loss(
    out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float], *, config: PolicyFields
) -> LossOutput:
    """Surrogate, entropy bonus and KL penalty; out.logprobs and out.entropy are [T]."""
    policy, metrics = policy_component(out, batch, config)
    regularizers, more = regularize(out, batch, config)
    return LossOutput(policy + regularizers, {**metrics, **more})


def regularize(out: PolicyOutput, batch: TrainBatch, config: RolloutFields):
    """-entropy_coef x entropy (over `entropy_scope`) + kl_coef x KL, with their metrics."""
    scope = Members.all(batch) if config.entropy_scope == "all" else Members.policy(batch)
    entropy, entropy_metrics = entropy_component(out, batch, config.entropy_coef, scope)
    kl, kl_metrics = kl_component(
        out,
        batch,
        config.kl_coef,
        config.kl_estimator,
        config.normalizer,
        config.max_response_length,
    )
    return entropy + kl, {**entropy_metrics, **kl_metrics}


class Grpo(AlgorithmBase):
    Config = GrpoConfig

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {"main": partial(grpo_loss, config=self.config)}

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        return {"main": surrogate_needs(self.config)}
