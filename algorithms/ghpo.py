"""GHPO: staged hints for prompts that the policy fails (arXiv 2507.10628).

Objective: grpo's: clipped surrogate over POLICY tokens - entropy_coef x entropy + kl_coef x KL. No imitation term: the
hint is CONTEXT.

Stage 0 is the plain prompt. A group whose rollouts are all known to fail is generated again behind the first tokens of
its demonstration, a larger fraction of them at each stage; the last stage is kept as it is. A group with an UNKNOWN
score is not known to have failed, and a prompt without demonstration stays at stage 0.

Departs from the public code: each group keeps the prompt it was generated with (there a rescued group trains under the
plain prompt after a later stage ran); hints are cut in tokens, not characters, and leave the end token and at least one
token of the response budget to the policy; the cold-start phase is left out. The gate looks at the whole reward, so a
format bonus must be a part that `failure_threshold` covers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from ..engine.contracts import DrawFn
from ..engine.ledger import ExpertLedger
from ..engine.types import RolloutGroup, RolloutRequest, Source, StepPlan, TokenIds, Update
from .base import PolicyFields, Setup
from .grpo import GrpoBase
from .losses import Normalizer
from .rounds import groups_by_prompt, has_failed
from .rows import rollout_rows
from .step_size import StepSize


class GhpoConfig(PolicyFields):
    type: Literal["ghpo"] = "ghpo"
    hint_fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.25, 0.5, 0.75)
    """Share of the demonstration's tokens that each stage after the plain one shows."""
    hint_start_step: int = Field(default=0, ge=0)
    """No hints before this many completed steps."""
    failure_threshold: float = 0.0
    """A group failed when no rollout's reward is above this."""
    advantage_epsilon: float = Field(default=1e-4, gt=0)
    normalizer: Normalizer = "tokens"


def hint_length(fraction: float, demo_length: int) -> int:
    """Tokens shown, half to even."""
    return round(fraction * demo_length)


class Ghpo(GrpoBase):
    Config = GhpoConfig
    extra_needs = frozenset({"demonstrations"})

    def __init__(self, config: GhpoConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self._stages: dict[str, float] = {}
        self._ledger = ExpertLedger()

    def follow_up(
        self, rounds: Sequence[Sequence[RolloutGroup]], step: int, draw: DrawFn
    ) -> Sequence[RolloutRequest]:
        """The next stage of every group of the last round that failed."""
        fractions = self.config.hint_fractions
        if step < self.config.hint_start_step or len(rounds) > len(fractions):
            return ()
        fraction = fractions[len(rounds) - 1]
        return [
            self.hinted_request(group, fraction)
            for group in rounds[-1]
            if group.prompt.demonstrations and has_failed(group, self.config.failure_threshold)
        ]

    def hinted_request(self, group: RolloutGroup, fraction: float) -> RolloutRequest:
        prompt, n, sampling = group.prompt, self.config.rollouts_per_prompt, self.setup.sampling
        return RolloutRequest(
            prompt, n, sampling, self.hint(prompt.demonstrations[0].token_ids, fraction)
        )

    def hint(self, demonstration: TokenIds, fraction: float) -> TokenIds:
        """The first tokens of a demonstration, never its end token, within the response budget."""
        longest = min(len(demonstration), self.setup.sampling.max_tokens) - 1
        return demonstration[: max(0, min(hint_length(fraction, len(demonstration)), longest))]

    def assemble(
        self, plan: StepPlan, groups: Sequence[RolloutGroup], step: int
    ) -> Sequence[Update]:
        """Each prompt trains with its last stage."""
        by_prompt = groups_by_prompt(groups)
        stages = [len(stages) - 1 for stages in by_prompt]
        self._stages = {
            f"stage_{stage}_share": stages.count(stage) / len(stages)
            for stage in range(1 + len(self.config.hint_fractions))
            if stages
        }
        hinted = frozenset(own[0].prompt.prompt_id for own in by_prompt if len(own) > 1)
        solved = {
            own[0].prompt.prompt_id: "solved"
            for own in by_prompt
            if own[0].rewards and not has_failed(own[0], self.config.failure_threshold)
        }
        gate = len(hinted) / len(by_prompt) if by_prompt else None
        self._ledger = ExpertLedger(gate_rate=gate, used=hinted, unused=solved)
        rows = rollout_rows([stages[-1] for stages in by_prompt], prefix_source=Source.CONTEXT)
        return [self.update(self.credit(rows), self.coefs(step))]

    def ledger(self, updates: Sequence[Update], step: int) -> ExpertLedger:
        """Gate: prompts that got a hint; a hint is shown and not trained."""
        return self._ledger

    def step_size(self, num_prompts: int, step: int) -> StepSize:
        """Every prompt at every stage."""
        size = super().step_size(num_prompts, step)
        hinted = step >= self.config.hint_start_step
        rounds = 1 + (len(self.config.hint_fractions) if hinted else 0)
        return replace(size, rollouts=size.rollouts * rounds, rounds=rounds)

    def metrics(self) -> Mapping[str, float]:
        """Share of the last step's prompts that ended at each stage; 0 is the plain prompt."""
        return self._stages
