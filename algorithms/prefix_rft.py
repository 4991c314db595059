"""Prefix-RFT: one rollout of each group continues a prefix of the demonstration (arXiv 2507.01679).

Objective: policy - entropy_coef x entropy + kl_coef x KL, the policy surrogate over *all* response tokens.

Prefix tokens carry their row's advantage and a ratio against the learner's own log-probs before the update, like
sampled ones. Only the `entropy_keep_fraction` of them with the highest entropy keep their advantage: where the policy
was unsure there is something to learn, and training all of them makes answers grow (paper's ablation). Filtered tokens
stay in the denominator. The prefix is long at first; its lower bound falls by a cosine.

    prefix_advantage shared     one advantage for both parts of a row, over the whole group (the method)
    prefix_advantage separate   plain rows R - m, continuations R, prefixes R - m, m = mean of the plain rows;
                                `advantage` has no say then

Departs from the public code: the filter ranks the whole update before its first step (there each micro-batch, as it is
trained); a mean over rows instead of their sum; prefixes are cut in token ids, never decoded and tokenized again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import ceil, floor
from statistics import fmean
from typing import Literal

from pydantic import Field, model_validator

from ..engine.contracts import LossFn, Need
from ..engine.ledger import ExpertLedger
from ..engine.types import (
    LossOutput,
    PolicyOutput,
    Prompt,
    RolloutGroup,
    RolloutRequest,
    Sample,
    Source,
    StepPlan,
    TrainBatch,
    Update,
)
from .advantages import Estimator, uniform_groups
from .base import (
    AlgorithmBase,
    PolicyFields,
    Setup,
    credit_groups,
    may_run_ahead,
    surrogate_needs,
    surrogate_only,
)
from .draws import uniforms
from .grpo import regularize
from .losses import Members, Normalizer, policy_component
from .schedules import cosine


class PrefixRftConfig(PolicyFields):
    type: Literal["prefix_rft"] = "prefix_rft"
    prefixed_rollouts_per_prompt: int = Field(default=1, ge=0)
    """Of the `rollouts_per_prompt` rows of a group, how many continue a demonstration's prefix."""
    prefix_ratio_low_start: float = Field(default=0.95, ge=0, le=1)
    prefix_ratio_low_end: float = Field(default=0.05, ge=0, le=1)
    prefix_ratio_high: float = Field(default=0.95, ge=0, le=1)
    """The share of the demonstration that is forced is uniform between the annealed low bound and this one."""
    prefix_decay_steps: int = Field(default=500, ge=0)
    """Loop steps of the low bound's cosine."""
    min_prefix_tokens: int = Field(default=1, ge=1)
    entropy_keep_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of prefix tokens, those of highest entropy, that keep their advantage."""
    clip_prefix: bool = True
    """false: the loss of prefix tokens is -A r, neither clipped nor dual-clipped."""
    prefix_advantage: Literal["shared", "separate"] = "shared"
    advantage: Estimator = "group_mean"
    dual_clip: float | None = Field(default=3.0, gt=1)
    normalizer: Normalizer = "constant"
    entropy_coef: float = Field(default=0.001, ge=0)

    @model_validator(mode="after")
    def _prefixed_rows_fit_the_group(self) -> PrefixRftConfig:
        if self.prefixed_rollouts_per_prompt > self.rollouts_per_prompt:
            raise ValueError(
                f"algorithm.prefixed_rollouts_per_prompt = {self.prefixed_rollouts_per_prompt} exceeds "
                f"algorithm.rollouts_per_prompt = {self.rollouts_per_prompt}; lower it"
            )
        return self


def prefix_ratio_low(step: int, config: PrefixRftConfig) -> float:
    start, end = config.prefix_ratio_low_start, config.prefix_ratio_low_end
    return cosine(step, start, end, config.prefix_decay_steps)


def prefix_ratio(step: int, draw: float, config: PrefixRftConfig) -> float:
    """Share of the demonstration that one uniform in [0, 1) stands for."""
    low = prefix_ratio_low(step, config)
    return low + (config.prefix_ratio_high - low) * draw


def prefix_length(ratio: float, demo_length: int, config: PrefixRftConfig) -> int:
    """Tokens to force: at least `min_prefix_tokens`, and at least one token is left to the policy."""
    if demo_length < 2:
        return 0
    wanted = max(floor(ratio * demo_length + 1e-9), config.min_prefix_tokens)
    return min(wanted, demo_length - 1)


def separate_advantages(samples: Sequence[Sample]) -> list[Sample]:
    """Plain rows R - m, continuations R, prefixes R - m; m = mean of the group's plain rows, 0 if fewer than two."""
    plain: dict[str, list[float]] = {}
    for sample in samples:
        if (reward := sample.shaped_reward) is not None and not is_hybrid(sample):
            plain.setdefault(sample.group_id, []).append(reward)
    rows = []
    for sample in samples:
        if (reward := sample.shaped_reward) is None:
            rows.append(sample)
            continue
        known = plain.get(sample.group_id, [])
        above = reward - (fmean(known) if len(known) > 1 else 0.0)
        own = reward if is_hybrid(sample) else above
        rows.append(sample.with_advantage(own).with_advantage(above, on=Source.EXPERT))
    return rows


def is_hybrid(sample: Sample) -> bool:
    return bool((sample.source == Source.EXPERT).any())


def keep_highest_entropy(batch: TrainBatch, fraction: float) -> TrainBatch:
    """Advantage 0 on all prefix tokens but the ceil(n x fraction) of highest recorded entropy.

    Of equal entropies the earlier in (row, position) order is dropped first.
    """
    prefix = batch.is_trained(Source.EXPERT)
    n = int(prefix.sum())
    if n == 0:
        return batch
    if batch.old_entropy is None:
        raise ValueError(
            "the prefix filter needs old_entropy; declare it in the algorithm's `needs`"
        )
    dropped = n - ceil(n * fraction - 1e-9)
    places = prefix.nonzero().squeeze(-1)
    order = batch.old_entropy[places].sort(stable=True).indices
    kept = prefix.clone()
    kept[places[order[:dropped]]] = False
    return replace(batch, advantages=batch.advantages.where(kept | ~prefix, 0.0))


def prefix_rft_loss(
    out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float], *, config: PrefixRftConfig
) -> LossOutput:
    """One surrogate over prefix and sampled tokens, entropy and KL over sampled ones."""
    prefix = batch.is_trained(Source.EXPERT)
    policy, metrics = policy_component(
        out, batch, config, Members.all(batch), None if config.clip_prefix else prefix
    )
    regularizers, more = regularize(out, batch, config)
    if batch.denom.expert_tokens:
        kept = (batch.advantages != 0).to(out.logprobs.dtype)
        more["kept_prefix_fraction"] = Members.expert(batch).mean(kept)
    return LossOutput(policy + regularizers, {**metrics, **more})


class PrefixRft(AlgorithmBase):
    Config = PrefixRftConfig

    def __init__(self, config: PrefixRftConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self._seen: dict[str, float] = {}
        self._too_short: dict[str, str] = {}

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {"main": partial(prefix_rft_loss, config=self.config)}

    @property
    def advantage_only(self) -> Mapping[str, frozenset[Source]]:
        return surrogate_only(self.config, Source.POLICY, Source.EXPERT)

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        return {"main": surrogate_needs(self.config) | {"demonstrations", "old_entropy"}}

    def coefs(self, step: int) -> dict[str, float]:
        return {"prefix_ratio_low": prefix_ratio_low(step, self.config)}

    @may_run_ahead
    def plan(self, prompts: Sequence[Prompt], experts: Sequence[Prompt], step: int) -> StepPlan:
        return StepPlan(tuple(r for prompt in prompts for r in self.requests(prompt, step)))

    def requests(self, prompt: Prompt, step: int) -> list[RolloutRequest]:
        """Plain rollouts, then one request a prefixed one; only plain ones where there is nothing to force."""
        config, sampling = self.config, self.setup.sampling
        lengths: list[int] = []
        if prompt.demonstrations:
            key = (self.setup.seed, "prefix_rft", step, prompt.prompt_id)
            demo_length = len(prompt.demonstrations[0].token_ids)
            for draw in uniforms(config.prefixed_rollouts_per_prompt, *key):
                length = prefix_length(prefix_ratio(step, draw, config), demo_length, config)
                lengths.append(min(length, sampling.max_tokens - 1))
        lengths = [length for length in lengths if length > 0]
        plain = config.rollouts_per_prompt - len(lengths)
        requests = [RolloutRequest(prompt, plain, sampling)] if plain else []
        for i, length in enumerate(lengths):
            prefix = prompt.demonstrations[0].token_ids[:length]
            requests.append(RolloutRequest(prompt, 1, sampling, prefix, first_index=plain + i))
        return requests

    def assemble(
        self, plan: StepPlan, groups: Sequence[RolloutGroup], step: int
    ) -> Sequence[Update]:
        forced = {r.prompt.prompt_id for r in plan.requests if r.prefix}
        demonstrated = {r.prompt.prompt_id for r in plan.requests if r.prompt.demonstrations}
        self._too_short = dict.fromkeys(sorted(demonstrated - forced), "too_short")
        updates = super().assemble(plan, groups, step)
        self._seen = prefix_metrics([row for update in updates for row in update.samples])
        return updates

    def credit(self, samples: Sequence[Sample]) -> list[Sample]:
        if self.config.prefix_advantage == "shared":
            return credit_groups(samples, self.config, (Source.POLICY, Source.EXPERT))
        rows = separate_advantages(samples)
        if not self.config.drop_uniform_groups:
            return rows
        dropped = uniform_groups([s.reward for s in rows], [s.group_id for s in rows])
        return [
            replace(s, weights=s.weights * 0)
            if s.reward is not None and s.group_id in dropped
            else s
            for s in rows
        ]

    def finish(self, batch: TrainBatch) -> TrainBatch:
        return keep_highest_entropy(batch, self.config.entropy_keep_fraction)

    def metrics(self) -> Mapping[str, float]:
        return self._seen

    def ledger(self, updates: Sequence[Update], step: int) -> ExpertLedger:
        return ExpertLedger(unused=self._too_short)


def prefix_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Share of response tokens that were forced, and mean reward with and without a prefix."""
    response = sum(int((s.source != Source.CONTEXT).sum()) for s in samples)
    forced = sum(int((s.source == Source.EXPERT).sum()) for s in samples)
    metrics = {"prefix_share": forced / response} if response else {}
    for name, wanted in (("reward_with_prefix", True), ("reward_without_prefix", False)):
        rewards = [s.reward for s in samples if s.reward is not None and is_hybrid(s) == wanted]
        if rewards:
            metrics[name] = fmean(rewards)
    return metrics
