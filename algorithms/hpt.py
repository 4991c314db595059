"""HPT: each question trains by RL or by SFT, as its rollouts decide (arXiv 2509.04419).

Objective: policy (surrogate on POLICY tokens) + expert_coef x expert - entropy_coef x entropy of all tokens
+ kl_coef x KL.

A question with at most `solved_gate` right rollouts loses them and trains its first demonstration instead (no reward,
in no statistic); otherwise its rollouts stay. Without a demonstration it stays in RL. Only known scores decide; a
question without any is left out. With `skip_out_of_reach_steps`, rollouts of a probe decide in the first steps.

Departs from the paper: its text on gamma = 1/8 contradicts its equation, and `<=` is what equation and code do. No std
and no clip, as in the code; the policy term is a mean over rows (code: sum), so expert_coef has another absolute scale:
the code's balance corresponds to a smaller expert_coef.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from pydantic import Field

from ..engine.contracts import LossFn, Need
from ..engine.ledger import ExpertLedger
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
from .advantages import Estimator
from .base import Setup, surrogate_needs, surrogate_only
from .hybrid import HybridFields, hybrid_loss
from .losses import Normalizer
from .reach import ReachFields, ReachGate
from .rows import expert_row, rollout_rows
from .step_size import StepSize

Route = Literal["rl", "sft"]


class HptConfig(HybridFields, ReachFields):
    type: Literal["hpt"] = "hpt"
    solved_gate: int = Field(default=0, ge=0)
    """A question with at most this many right rollouts trains its demonstration (Qwen 0, LLaMA 2)."""
    success_threshold: float = 1.0
    expert_coef: float = Field(default=1.0, ge=0)
    advantage: Estimator = "group_mean"
    clip_low: float | None = Field(default=None, ge=0)
    clip_high: float | None = Field(default=None, ge=0)
    normalizer: Normalizer = "constant"
    entropy_coef: float = Field(default=0.001, ge=0)
    entropy_scope: Literal["policy", "all"] = "all"


def count_solved(rewards: Sequence[float], success_threshold: float) -> int:
    return sum(reward >= success_threshold for reward in rewards)


def choose_route(rewards: Sequence[float], config: HptConfig) -> Route:
    """How a question with these known rewards trains."""
    solved = count_solved(rewards, config.success_threshold)
    return "sft" if solved <= config.solved_gate else "rl"


def hpt_loss(
    out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float], *, config: HptConfig
) -> LossOutput:
    """policy + expert_coef x expert + regularizers; the losses logged are those before expert_coef."""
    return hybrid_loss(out, batch, coefs, config, expert_weight=config.expert_coef)


class Hpt(ReachGate):
    Config = HptConfig

    def __init__(self, config: HptConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.sft_share: float | None = None
        self._solved: dict[str, str] = {}

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {"main": partial(hpt_loss, config=self.config)}

    @property
    def advantage_only(self) -> Mapping[str, frozenset[Source]]:
        return surrogate_only(self.config, Source.POLICY)

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        return {"main": surrogate_needs(self.config) | {"demonstrations"}}

    def assemble(
        self, plan: StepPlan, groups: Sequence[RolloutGroup], step: int
    ) -> Sequence[Update]:
        scored = [group for group in groups if group.rewards]
        routed = [
            bool(group.prompt.demonstrations) and choose_route(group.rewards, self.config) == "sft"
            for group in scored
        ]
        skipped = plan.experts
        known = len(routed) + len(skipped)
        self.sft_share = (sum(routed) + len(skipped)) / known if known else None
        self._solved = {
            g.prompt.prompt_id: "solved" for g, sft in zip(scored, routed, strict=True) if not sft
        }
        rows: list[Sample] = []
        for group, to_sft in zip(scored, routed, strict=True):
            prompt = group.prompt
            if to_sft:
                demonstration = prompt.demonstrations[0]
                rows.append(expert_row(prompt, demonstration, self.config.max_response_length))
            else:
                rows += rollout_rows([group])
        limit = self.config.max_response_length
        rows += [expert_row(prompt, prompt.demonstrations[0], limit) for prompt in skipped]
        return [self.update(self.credit(rows), self.coefs(step))]

    def step_size(self, num_prompts: int, step: int) -> StepSize:
        """A switched question trains one demonstration in the place of its group."""
        size = super().step_size(num_prompts, step)
        return replace(size, expert_rows=num_prompts)

    def metrics(self) -> Mapping[str, float]:
        """sft_share: prompts of the last step that trained their demonstration, of those scored or skipped."""
        return {} if self.sft_share is None else {"sft_share": self.sft_share}

    def ledger(self, updates: Sequence[Update], step: int) -> ExpertLedger:
        """Gate: questions that trained their demonstration, of those with a known score or skipped."""
        known = super().ledger(updates, step)
        return replace(known, gate_rate=self.sft_share, unused=self._solved)
