"""The objective of methods whose update has both a policy component and an expert component."""

from __future__ import annotations

from collections.abc import Mapping

from ..engine.types import LossOutput, PolicyOutput, TrainBatch
from .base import ExpertFields, PolicyFields
from .grpo import regularize
from .losses import expert_component, policy_component


class HybridFields(PolicyFields, ExpertFields):
    """Fields of every algorithm with a policy surrogate and an expert loss."""


def hybrid_loss(
    out: PolicyOutput,
    batch: TrainBatch,
    coefs: Mapping[str, float],
    config: HybridFields,
    *,
    policy_weight: float = 1.0,
    expert_weight: float,
) -> LossOutput:
    """policy_weight x policy + expert_weight x expert + regularizers; losses logged are those before the weights."""
    policy, policy_metrics = policy_component(out, batch, config)
    expert, expert_metrics = expert_component(
        out, batch, config.expert_loss, config.expert_normalizer, config.max_response_length, coefs
    )
    regularizers, metrics = regularize(out, batch, config)
    loss = policy_weight * policy + expert_weight * expert + regularizers
    return LossOutput(loss, {**policy_metrics, **expert_metrics, **metrics})
