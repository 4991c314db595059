"""One-token rollout: fine-tuning data as a policy gradient at every token (arXiv 2509.26313).

Objective: at each EXPERT token x, K tokens a ~ softmax(logits / sampling_temperature), constants; reward 1 if a = x,
else miss_reward; loss = -(1/K) sum of reward x log p(a). Averaged by `normalizer`. No ratio, baseline, clip,
KL or entropy.

With `exact_expectation` the frequencies of the draws are replaced by their probabilities: no noise, no draws.
Whole vocabularies never leave the LM head's chunk; the loss sees three sums a token (`engine.types.TokenSamples`).

The paper leaves the temperature of the differentiated log-prob, the value of miss_reward and the normalizer open: here
log-probs are untempered (`tempered_logprobs` tempers them), -0.1, and token means. A negative miss_reward makes the
loss unbounded below: watch `nll`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from pydantic import Field

from ..engine.contracts import LossFn, Need
from ..engine.types import (
    LossOutput,
    PolicyOutput,
    Prompt,
    Sample,
    StepPlan,
    TokenSampling,
    TrainBatch,
)
from .base import AlgorithmBase, AlgorithmConfig, Setup
from .losses import Members, Metrics, Normalizer


class OneTokenRolloutConfig(AlgorithmConfig):
    type: Literal["one_token_rollout"] = "one_token_rollout"
    samples_per_token: int = Field(default=256, ge=1)
    """Draws at each position (K in the paper)."""
    sampling_temperature: float = Field(default=1.3, gt=0)
    miss_reward: float = -0.1
    """Reward of a draw that is not the demonstration's token (beta in the paper)."""
    tempered_logprobs: bool = False
    """Differentiate the distribution that is sampled from instead of the policy's own."""
    exact_expectation: bool = False
    """Use the probabilities instead of draws; `samples_per_token` has no say then."""
    normalizer: Normalizer = "tokens"


def one_token_rollout_loss(
    out: PolicyOutput,
    batch: TrainBatch,
    coefs: Mapping[str, float],
    *,
    config: OneTokenRolloutConfig,
) -> LossOutput:
    """out.samples: three [T] sums over the draws; out.logprobs [T] only for the metric `nll`."""
    if out.samples is None:
        raise ValueError("one_token_rollout needs token_samples; declare it in `needs`")
    members = Members.expert(batch)
    values = -(out.samples.hit_logprobs + config.miss_reward * out.samples.miss_logprobs)
    loss = members.normalize(
        batch.weights * values, batch, config.normalizer, config.max_response_length
    )
    metrics: Metrics = {"expert_loss": loss.detach()}
    if members.tokens:
        hit_rate = out.samples.hit_rate
        metrics["hit_rate"] = members.mean(hit_rate)
        metrics["mean_reward"] = members.mean(hit_rate + config.miss_reward * (1 - hit_rate))
        metrics["nll"] = members.mean(-out.logprobs.detach())
    return LossOutput(loss, metrics)


class OneTokenRollout(AlgorithmBase):
    Config = OneTokenRolloutConfig
    every_prompt_demonstrated = True

    def __init__(self, config: OneTokenRolloutConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.token_sampling = TokenSampling(
            config.samples_per_token,
            config.sampling_temperature,
            exact=config.exact_expectation,
            tempered_logprobs=config.tempered_logprobs,
        )

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {"main": partial(one_token_rollout_loss, config=self.config)}

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        return {"main": frozenset({"demonstrations", "token_samples"})}

    def plan(self, prompts: Sequence[Prompt], experts: Sequence[Prompt], step: int) -> StepPlan:
        return StepPlan(experts=tuple(prompts))

    def credit(self, samples: Sequence[Sample]) -> list[Sample]:
        return list(samples)
