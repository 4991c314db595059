"""RIFT: reward-informed fine-tuning on self-generated rows, right and wrong (arXiv 2601.09253).

Objective: with the signed reward s = positive_reward where R >= success_threshold, else negative_reward: -s log p where
s > 0, -s p where s < 0 (p is pushed down with a bounded gradient), 0 where s = 0; - entropy_coef x entropy.

    probability_scope token      per token, divided by `normalizer`
    probability_scope row_mean   log p is the mean over the row; a mean over rows
    probability_scope row_sum    log p is the sum over the row; a mean over rows. Underflows on long rows.

Rows are rollouts; expert rows that carry a reward are trained alike, in the same component. Entropy is that of the same
tokens. Departs from the paper: its scope is not verified, `token` is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from pydantic import Field

from ..engine.contracts import LossFn, Need
from ..engine.types import LossOutput, PolicyOutput, Sample, Source, TrainBatch
from .base import AlgorithmBase, AlgorithmConfig
from .losses import Members, Normalizer, entropy_component
from .reward_signed import SignFields, signed


class RiftConfig(SignFields, AlgorithmConfig):
    type: Literal["rift"] = "rift"
    rollouts_per_prompt: int = Field(default=8, ge=1)
    normalizer: Normalizer = "tokens"
    """Of the `token` scope; the row scopes are means over rows."""
    entropy_coef: float = Field(default=0.0, ge=0)


def rift_loss(
    out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float], *, config: RiftConfig
) -> LossOutput:
    """-s log p or -s p, minus an entropy bonus; advantages are s."""
    members = Members.all(batch)
    values = signed(out.logprobs, batch.advantages, members, batch, config.probability_scope)
    normalizer = config.normalizer if config.probability_scope == "token" else "rows"
    component = members.normalize(values, batch, normalizer, config.max_response_length)
    entropy, metrics = entropy_component(out, batch, config.entropy_coef, members)
    return LossOutput(component + entropy, {"policy_loss": component.detach(), **metrics})


class Rift(AlgorithmBase):
    Config = RiftConfig

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {"main": partial(rift_loss, config=self.config)}

    @property
    def advantage_only(self) -> Mapping[str, frozenset[Source]]:
        if self.config.entropy_coef > 0:
            return {}
        return {"main": frozenset({Source.POLICY, Source.EXPERT})}

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        return {"main": frozenset({"entropy"} if self.config.entropy_coef > 0 else ())}

    def credit(self, samples: Sequence[Sample]) -> list[Sample]:
        """s on all tokens of a row with a reward."""
        rows: list[Sample] = []
        for row in samples:
            if row.reward is not None:
                sign = self.config.sign(row.reward)
                row = row.with_advantage(sign).with_advantage(sign, on=Source.EXPERT)
            rows.append(row)
        return rows
