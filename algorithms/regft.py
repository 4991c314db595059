"""ReGFT: fine-tuning on verified solutions of one's own, hard problems with a hint (arXiv 2603.01223).

Objective: sft's: expert loss over EXPERT tokens - entropy_coef x entropy of EXPERT tokens.

A data stage before RL. Every prompt is rolled out; its pass rate says whether it is hard. A hard one is rolled out
again with the first tokens of its demonstration shown in the user's turn, so that the policy writes a whole solution of
its own. Verified solutions, at most `max_kept_per_problem` of a prompt in order, become EXPERT rows under the original
prompt, without the hint. Other prompts keep verified plain rollouts by the same rule, and so do hard ones to which no
hint can be shown (no demonstration, or the prompt would exceed `rollouts.max_prompt_length`). A prompt without any
known score is not known to be hard.

Where the paper leaves this open: `pass_rate_threshold` and `max_kept_per_problem` are ours, `hint_fraction` rests on
one account. A solution that was cut at the length limit is judged by its reward alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor
from statistics import fmean
from typing import Literal

from pydantic import Field

from ..engine.contracts import DrawFn
from ..engine.ledger import ExpertLedger
from ..engine.types import (
    Prompt,
    RolloutGroup,
    RolloutRequest,
    Sample,
    StepPlan,
    Update,
)
from .base import AlgorithmBase, Setup, may_run_ahead
from .rounds import groups_by_prompt
from .rows import make_row
from .sft import Sft, SupervisedFields
from .step_size import StepSize


class RegftConfig(SupervisedFields):
    type: Literal["regft"] = "regft"
    rollouts_per_prompt: int = Field(default=8, ge=1)
    """Rollouts of each prompt, and again of each hard one with its hint."""
    pass_rate_threshold: float = Field(default=0.25, ge=0, le=1)
    """A prompt is hard when a smaller share of its scored rollouts is right."""
    hint_fraction: float = Field(default=0.8, ge=0, le=1)
    """Share of the demonstration's tokens that is shown."""
    max_kept_per_problem: int = Field(default=4, ge=1)
    success_threshold: float = 1.0


def is_hard(pass_rate: float, config: RegftConfig) -> bool:
    return pass_rate < config.pass_rate_threshold


def hint_length(demo_length: int, config: RegftConfig) -> int:
    """Tokens shown of a demonstration."""
    return floor(config.hint_fraction * demo_length + 1e-9)


def keep_candidates(rewards: Sequence[float | None], config: RegftConfig) -> list[int]:
    """Places of the first verified candidates; one with an UNKNOWN score is not verified."""
    right = [i for i, r in enumerate(rewards) if r is not None and r >= config.success_threshold]
    return right[: config.max_kept_per_problem]


class Regft(Sft):
    Config = RegftConfig
    every_prompt_demonstrated = False

    def __init__(self, config: RegftConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.trains_own_responses = True
        self._seen: dict[str, float] = {}
        self._ledger = ExpertLedger()

    @may_run_ahead
    def plan(self, prompts: Sequence[Prompt], experts: Sequence[Prompt], step: int) -> StepPlan:
        return AlgorithmBase.plan(self, prompts, (), step)

    def follow_up(
        self, rounds: Sequence[Sequence[RolloutGroup]], step: int, draw: DrawFn
    ) -> Sequence[RolloutRequest]:
        """One more round: the hard prompts with their hints."""
        if len(rounds) > 1:
            return ()
        hinted = [self.with_hint(group.prompt) for group in rounds[0] if self.is_hard(group)]
        return [self.request(prompt) for prompt in hinted if prompt is not None]

    def is_hard(self, group: RolloutGroup) -> bool:
        threshold, rewards = self.config.success_threshold, group.rewards
        return bool(rewards) and is_hard(fmean(r >= threshold for r in rewards), self.config)

    def with_hint(self, prompt: Prompt) -> Prompt | None:
        """The prompt with its hint in the user's turn; None where there is nothing to show, or no room for it."""
        if self.setup.show_hint is None:
            raise ValueError("regft shows hints in the prompt, but Setup.show_hint is not set")
        if not prompt.demonstrations:
            return None
        demonstration = prompt.demonstrations[0].token_ids
        # Never the end token: it would close the user's turn.
        hint = demonstration[:-1][: hint_length(len(demonstration), self.config)]
        return self.setup.show_hint(prompt, hint) if hint else None

    def assemble(
        self, plan: StepPlan, groups: Sequence[RolloutGroup], step: int
    ) -> Sequence[Update]:
        """Rows of the kept solutions; no update where none was kept."""
        by_prompt = groups_by_prompt(groups)
        rows = [row for own in by_prompt for row in self.solution_rows(own[0].prompt, own[-1])]
        hard = [own for own in by_prompt if self.is_hard(own[0])]
        self._seen = {
            "kept_candidates": float(len(rows)),
            "hard_without_hint": float(sum(len(own) == 1 for own in hard)),
        }
        if scored := sum(bool(own[0].rewards) for own in by_prompt):
            self._seen["hard_share"] = len(hard) / scored
        kept = {row.group_id for row in rows}
        hinted = {own[0].prompt.prompt_id for own in by_prompt if len(own) > 1}
        without_hint = {own[0].prompt.prompt_id for own in hard} - hinted
        scored_ids = {own[0].prompt.prompt_id for own in by_prompt if own[0].rewards}
        self._ledger = ExpertLedger(
            gate_rate=len(hinted) / len(by_prompt) if by_prompt else None,
            used=frozenset(hinted & kept),
            unused={
                **dict.fromkeys(scored_ids - hinted, "solved"),
                **dict.fromkeys(without_hint, "too_short"),
                **dict.fromkeys(hinted - kept, "no_right_solution"),
            },
        )
        rows = self.alone(rows, [own[0].prompt for own in by_prompt], step)
        return [self.update(rows, self.coefs(step))] if rows else []

    def solution_rows(self, prompt: Prompt, group: RolloutGroup) -> list[Sample]:
        """The kept rollouts of `group` as expert rows under `prompt`, which has no hint."""
        rewards = [score.reward for score in group.scores]
        return [
            make_row(
                prompt,
                rollout.token_ids,
                prefix_len=len(rollout.token_ids),
                reward=rewards[place],
                policy_version=rollout.policy_version,
            )
            for place in keep_candidates(rewards, self.config)
            if (rollout := group.rollouts[place]).token_ids
        ]

    def ledger(self, updates: Sequence[Update], step: int) -> ExpertLedger:
        """Gate: prompts that were asked again with their demonstration as a hint; its tokens never train."""
        return self._ledger

    def step_size(self, num_prompts: int, step: int) -> StepSize:
        """Every prompt is hard and keeps what it may, or one solution beside a rejected one."""
        group, kept = self.config.rollouts_per_prompt, self.config.max_kept_per_problem
        rows = num_prompts * (min(group, kept) if self.rows_per_expert == 1 else 2)
        return StepSize(2 * num_prompts * group, 2, rows, (self.phase(rows),))

    def metrics(self) -> Mapping[str, float]:
        """Of the last step: kept solutions, share of hard prompts among scored ones, hard ones that got no hint."""
        return {**super().metrics(), **self._seen}
