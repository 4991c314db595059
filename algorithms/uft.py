"""UFT, unified fine-tuning: rollouts that start with a hint, the first pieces of a solution (arXiv 2505.16984).

Objective: policy(POLICY) + expert_coef x expert(hint tokens) - entropy_coef x entropy + kl_coef x KL.

All rows of a group start with the same hint. Hint tokens have no advantage, ratio, entropy or KL, only the expert loss.
Their number falls with a schedule, so exploration starts near the answer and ends at the bare question; the hint never
holds the last piece of the solution. Evaluation has no hints.

    hint_sampling binomial   length drawn as `hint_buckets` coins of the annealed `hint_probability` (the method)
    hint_sampling uniform    a uniform length in every step (R3, a baseline of the paper)
    hint_sampling staged     one length for all prompts, shorter from stage to stage (a baseline of the paper)

Departs from the paper: two coefficients and token means, as in the public code (paper: one beta, token sums). From the
code: the hint loss is normalized over the minibatch (there per micro-batch); logits are not clamped; a hint too long
for the response budget loses whole pieces, it is never cut inside one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import cos, floor, pi
from statistics import fmean
from typing import Literal

from pydantic import Field

from ..engine.contracts import LossFn, Need
from ..engine.ledger import ExpertLedger
from ..engine.types import (
    LossOutput,
    PolicyOutput,
    Prompt,
    RolloutGroup,
    RolloutRequest,
    Source,
    StepPlan,
    TrainBatch,
    Update,
)
from .base import AlgorithmBase, Setup, may_run_ahead, surrogate_needs, surrogate_only
from .draws import uniforms
from .hybrid import HybridFields, hybrid_loss


class UftConfig(HybridFields):
    type: Literal["uft"] = "uft"
    rollouts_per_prompt: int = Field(default=4, ge=1)
    hint_buckets: int = Field(default=5, ge=1)
    """Number of different hint lengths above none (L in the paper)."""
    hint_probability_high: float = Field(default=0.95, ge=0, le=1)
    hint_probability_low: float = Field(default=0.05, ge=0, le=1)
    hint_steps: int = Field(default=300, ge=0)
    """Loop steps with hints; the probability falls from high to low over them and is 0 afterwards."""
    hint_sampling: Literal["binomial", "uniform", "staged"] = "binomial"
    expert_coef: float = Field(default=0.001, ge=0)
    """Weight of the hint tokens' loss."""
    entropy_coef: float = Field(default=0.001, ge=0)
    kl_coef: float = Field(default=0.001, ge=0)


@dataclass(frozen=True)
class Hint:
    """What is shown of one solution: the first `pieces_shown` pieces, `prefix_len` tokens."""

    bucket: int
    pieces_shown: int
    prefix_len: int


def hint_probability(step: int, config: UftConfig) -> float:
    """Half a cosine from high to low over `hint_steps`, then 0."""
    if step >= config.hint_steps:
        return 0.0
    low, high = config.hint_probability_low, config.hint_probability_high
    return low + (high - low) / 2 * (1 + cos(pi * (step + 1) / config.hint_steps))


def choose_hint(
    step: int, piece_lengths: Sequence[int], draws: Sequence[float], config: UftConfig
) -> Hint:
    """`piece_lengths`: tokens of each piece that may be shown; `draws`: at least `hint_buckets` uniforms."""
    num = min(config.hint_buckets, len(piece_lengths))
    if config.hint_sampling == "binomial":
        probability = hint_probability(step, config)
        bucket = sum(draw < probability for draw in draws[:num])
    elif config.hint_sampling == "uniform":
        bucket = floor(draws[0] * (num + 1))
    else:
        bucket = staged_bucket(step + 1, num, config.hint_steps)
    shown = round(bucket * len(piece_lengths) / num) if num else 0
    return Hint(bucket, shown, sum(piece_lengths[:shown]))


def staged_bucket(t: int, num: int, hint_steps: int) -> int:
    """num at first, one less after each of num + 1 equal stages; 0 after `hint_steps`."""
    if t > hint_steps:
        return 0
    return min(max(num - t // max(hint_steps // (num + 1), 1), 0), num)


def uft_loss(
    out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float], *, config: UftConfig
) -> LossOutput:
    """Surrogate on the continuation, expert loss on the hint; the expert loss logged is that before expert_coef."""
    return hybrid_loss(out, batch, coefs, config, expert_weight=config.expert_coef)


def pieces_to_show(prompt: Prompt) -> Sequence[int]:
    """Tokens of each piece of its solution but the last, which holds the answer."""
    return prompt.demonstrations[0].piece_lengths[:-1] if prompt.demonstrations else ()


def share_shown(request: RolloutRequest) -> float:
    """Of the pieces that may be shown; 0 where there is none."""
    ends = list(accumulate(pieces_to_show(request.prompt)))
    return sum(end <= len(request.prefix) for end in ends) / len(ends) if ends else 0.0


class Uft(AlgorithmBase):
    Config = UftConfig

    def __init__(self, config: UftConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self._shares: list[float] = []  # of pieces shown, by prompt of the step
        self._too_short: dict[str, str] = {}  # prompts whose solution has no piece to show

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {"main": partial(uft_loss, config=self.config)}

    @property
    def advantage_only(self) -> Mapping[str, frozenset[Source]]:
        return surrogate_only(self.config, Source.POLICY)

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        return {"main": surrogate_needs(self.config) | {"demonstrations"}}

    def coefs(self, step: int) -> dict[str, float]:
        return {"hint_probability": hint_probability(step, self.config), **super().coefs(step)}

    @may_run_ahead
    def plan(self, prompts: Sequence[Prompt], experts: Sequence[Prompt], step: int) -> StepPlan:
        return StepPlan(tuple(self.hinted_request(prompt, step) for prompt in prompts))

    def hinted_request(self, prompt: Prompt, step: int) -> RolloutRequest:
        """A whole group that starts with this step's hint; a prompt without solution gets none."""
        n, sampling = self.config.rollouts_per_prompt, self.setup.sampling
        if not prompt.demonstrations:
            return RolloutRequest(prompt, n, sampling)
        demonstration, pieces = prompt.demonstrations[0], pieces_to_show(prompt)
        draws = uniforms(self.config.hint_buckets, self.setup.seed, "uft", step, prompt.prompt_id)
        hint = choose_hint(step, pieces, draws, self.config)
        shown, length = hint.pieces_shown, hint.prefix_len
        while length >= sampling.max_tokens:
            shown -= 1
            length -= pieces[shown]
        return RolloutRequest(prompt, n, sampling, prefix=demonstration.token_ids[:length])

    def assemble(
        self, plan: StepPlan, groups: Sequence[RolloutGroup], step: int
    ) -> Sequence[Update]:
        self._shares = [share_shown(request) for request in plan.requests]
        demonstrated = (r.prompt for r in plan.requests if r.prompt.demonstrations)
        self._too_short = {p.prompt_id: "too_short" for p in demonstrated if not pieces_to_show(p)}
        return super().assemble(plan, groups, step)

    def metrics(self) -> Mapping[str, float]:
        """Mean share of pieces shown, and share of rows with a hint, in the last step."""
        if not self._shares:
            return {}
        hinted = fmean(share > 0 for share in self._shares)
        return {"hint_share": fmean(self._shares), "hinted_rows": hinted}

    def ledger(self, updates: Sequence[Update], step: int) -> ExpertLedger:
        """Gate: prompts of the step with a hint."""
        gate = fmean(share > 0 for share in self._shares) if self._shares else None
        return replace(super().ledger(updates, step), gate_rate=gate, unused=self._too_short)
