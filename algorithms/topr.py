"""TOPR: tapered off-policy REINFORCE (arXiv 2503.14286).

Objective: -alpha (R - reward_baseline) log p over POLICY tokens - entropy_coef x entropy + kl_coef x KL. alpha is a
constant of the row, the sequence ratio q between policy and behaviour policy, clipped: to the `positive_ratio_*` range
where R >= reward_baseline, else to the `negative_ratio_*` range. By default rows above the baseline are imitated as
they are (alpha = 1), rows below it fade out as the policy leaves them (alpha <= 1).

Behaviour log-probs are `old_logprobs`: the policy's own before the update, or the recorded ones of offline rows. No
demonstrations are needed. Rewards should be signed, +1 and -1.

Departs from the paper: sums over sequences are divided by a constant length, and averaged over rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from ..engine.contracts import LossFn, Need
from ..engine.types import LossOutput, PolicyOutput, Sample, Source, TrainBatch
from .base import AlgorithmBase, RolloutFields, surrogate_needs, surrogate_only
from .grpo import regularize
from .losses import Members, Normalizer
from .reward_signed import TaperFields, tapered


class ToprConfig(TaperFields, RolloutFields):
    type: Literal["topr"] = "topr"
    normalizer: Normalizer = "constant"


def topr_loss(
    out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float], *, config: ToprConfig
) -> LossOutput:
    """Tapered REINFORCE over POLICY tokens plus regularizers; advantages are R - reward_baseline."""
    members = Members.policy(batch)
    if batch.old_logprobs is None:
        raise ValueError("the taper needs old_logprobs; declare it in the algorithm's `needs`")
    advantages = batch.advantages
    values, metrics = tapered(out.logprobs, batch.old_logprobs, advantages, members, batch, config)
    length = config.max_response_length
    component = members.normalize(values, batch, config.normalizer, length)
    regularizers, more = regularize(out, batch, config)
    return LossOutput(
        component + regularizers, {"policy_loss": component.detach(), **metrics, **more}
    )


class Topr(AlgorithmBase):
    Config = ToprConfig

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {"main": partial(topr_loss, config=self.config)}

    @property
    def advantage_only(self) -> Mapping[str, frozenset[Source]]:
        return surrogate_only(self.config, Source.POLICY)

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        return {"main": surrogate_needs(self.config)}

    def credit(self, samples: Sequence[Sample]) -> list[Sample]:
        """R - reward_baseline on POLICY tokens; rows without a reward keep 0."""
        return [
            row
            if (reward := row.shaped_reward) is None
            else row.with_advantage(reward - self.config.reward_baseline)
            for row in samples
        ]
