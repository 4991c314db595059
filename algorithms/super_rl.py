"""SuperRL: RL where some rollout succeeds, SFT on the demonstrations elsewhere (arXiv 2506.01096).

Objective: (1 - expert_share) x policy + expert_share x expert - entropy_coef x entropy + kl_coef x KL.
expert_share = SFT-routed prompts / all prompts of the update: the mean over prompts of a hard switch.

A prompt whose best reward is at most `failure_threshold` loses its rollouts and contributes all its demonstrations (no
reward, in no statistic). Without a demonstration it stays in RL. Only known scores decide; a prompt without any is left
out. Prompts whose rows train nothing (`drop_uniform_groups`) are not counted in expert_share. With
`skip_out_of_reach_steps`, rollouts of a probe decide in the first steps.

Departs from the paper: the advantage-gated and learned-sigma variants are not offered; both normalizers, `rows`, are
ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from ..engine.contracts import LossFn, Need
from ..engine.ledger import ExpertLedger
from ..engine.types import (
    LossOutput,
    PolicyOutput,
    Prompt,
    RolloutGroup,
    Sample,
    Source,
    StepPlan,
    TrainBatch,
    Update,
)
from .base import Setup, surrogate_needs, surrogate_only
from .hybrid import HybridFields, hybrid_loss
from .losses import Normalizer
from .reach import ReachFields, ReachGate
from .rows import expert_row, rollout_rows
from .step_size import StepSize

Route = Literal["rl", "sft"]


class SuperRlConfig(HybridFields, ReachFields):
    type: Literal["super_rl"] = "super_rl"
    failure_threshold: float = 0.0
    """A prompt whose best rollout has at most this reward trains its demonstrations."""
    normalizer: Normalizer = "rows"
    expert_normalizer: Normalizer = "rows"


def choose_route(rewards: Sequence[float], config: SuperRlConfig) -> Route:
    """How a prompt with these known rewards trains."""
    return "sft" if max(rewards) <= config.failure_threshold else "rl"


def expert_share(samples: Sequence[Sample]) -> float:
    """Distinct groups of trained expert rows / distinct groups of trained rows; 0 where nothing trains."""
    trained = [s for s in samples if s.weights[s.source != Source.CONTEXT].any()]
    experts = {s.group_id for s in trained if not (s.source == Source.POLICY).any()}
    return len(experts) / max(len({s.group_id for s in trained}), 1)


def super_rl_loss(
    out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float], *, config: SuperRlConfig
) -> LossOutput:
    """(1 - share) policy + share expert + regularizers; coefs: expert_share. Logged losses are those before it."""
    share = coefs["expert_share"]
    return hybrid_loss(out, batch, coefs, config, policy_weight=1 - share, expert_weight=share)


class SuperRl(ReachGate):
    Config = SuperRlConfig

    def __init__(self, config: SuperRlConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self._routes: dict[str, Route] = {}  # of the last step's prompts with a known score

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {"main": partial(super_rl_loss, config=self.config)}

    @property
    def advantage_only(self) -> Mapping[str, frozenset[Source]]:
        return surrogate_only(self.config, Source.POLICY)

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        return {"main": surrogate_needs(self.config) | {"demonstrations"}}

    def update(self, samples: Sequence[Sample], coefs: Mapping[str, float]) -> Update:
        """The share follows from the update's own rows."""
        return super().update(samples, {**coefs, "expert_share": expert_share(samples)})

    def step_size(self, num_prompts: int, step: int) -> StepSize:
        """A switched prompt trains its demonstrations, taken to be no more than its rollouts, in their place."""
        size = super().step_size(num_prompts, step)
        return replace(size, expert_rows=size.rows)

    def assemble(
        self, plan: StepPlan, groups: Sequence[RolloutGroup], step: int
    ) -> Sequence[Update]:
        rows: list[Sample] = []
        self._routes = {}
        for group in groups:
            prompt = group.prompt
            if not group.rewards:
                continue
            route = choose_route(group.rewards, self.config) if prompt.demonstrations else "rl"
            self._routes[prompt.prompt_id] = route
            if route == "sft":
                rows += self.all_demonstrations(prompt)
            else:
                rows += rollout_rows([group])
        for prompt in plan.experts:  # skipped
            self._routes[prompt.prompt_id] = "sft"
            rows += self.all_demonstrations(prompt)
        return [self.update(self.credit(rows), self.coefs(step))]

    def all_demonstrations(self, prompt: Prompt) -> list[Sample]:
        limit = self.config.max_response_length
        return [expert_row(prompt, d, limit) for d in prompt.demonstrations]

    def ledger(self, updates: Sequence[Update], step: int) -> ExpertLedger:
        """Gate: prompts that trained their demonstrations, of those with a known score or skipped."""
        routes = self._routes
        gate = sum(route == "sft" for route in routes.values()) / len(routes) if routes else None
        solved = {prompt_id: "solved" for prompt_id, route in routes.items() if route == "rl"}
        coef = updates[0].coefs["expert_share"] if updates else None
        return ExpertLedger(coef, gate, unused=solved)
