"""Data selection by what the current model makes of the demonstration's own prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from pydantic import Field

from ..engine.config import Section
from ..engine.contracts import Need
from ..engine.types import RolloutGroup, Sample
from .rows import make_row


@dataclass(frozen=True)
class Judged:
    """What rollouts of the prompts leave of a step's rows."""

    rows: Sequence[Sample]
    dropped: Mapping[str, str] = field(default_factory=dict)
    """prompt_id -> why its demonstration does not train."""
    metrics: Mapping[str, float] = field(default_factory=dict)


class SelectionRule(Section):
    """Defaults of every rule."""

    @property
    def needs(self) -> frozenset[Need]:
        """Columns recorded for the candidate batch; the host adds them to its own needs."""
        return frozenset()

    @property
    def num_rollouts(self) -> int:
        """Of each demonstration's prompt, every step; 0: none."""
        return 0

    def judge_rows(self, rows: Sequence[Sample], groups: Sequence[RolloutGroup]) -> Judged:
        """Rows that train, from the scored rollouts of their prompts."""
        return Judged(list(rows))


class SelfResponse(SelectionRule):
    """The model's own right answer replaces the demonstration: S3FT, selective self-rehearsal.

    A candidate whose score is UNKNOWN is not accepted.
    """

    type: Literal["self_response"]
    max_candidates: int = Field(default=1, ge=1)
    """Rollouts of each prompt; the first accepted one counts."""
    accept_reward: float = 1.0
    """A candidate with at least this reward is accepted."""

    @property
    def num_rollouts(self) -> int:
        return self.max_candidates

    def accepted(self, rewards: Sequence[float | None]) -> int | None:
        """Number of the candidate that replaces the demonstration; None keeps it. None in `rewards`: UNKNOWN."""
        for i, reward in enumerate(rewards[: self.max_candidates]):
            if reward is not None and reward >= self.accept_reward:
                return i
        return None

    def judge_rows(self, rows: Sequence[Sample], groups: Sequence[RolloutGroup]) -> Judged:
        by_prompt = {group.prompt.prompt_id: group for group in groups}
        trained = [self.judged(row, by_prompt[row.group_id]) for row in rows]
        pairs = zip(trained, rows, strict=True)
        replaced = {old.group_id: "self_response" for new, old in pairs if new is not old}
        share = {"self_response_share": len(replaced) / len(rows)} if rows else {}
        return Judged(trained, replaced, share)

    def judged(self, row: Sample, group: RolloutGroup) -> Sample:
        """The demonstration's row, or that of the accepted candidate: EXPERT tokens either way."""
        chosen = self.accepted([score.reward for score in group.scores])
        if chosen is None or not group.rollouts[chosen].token_ids:
            return row
        response = group.rollouts[chosen].token_ids
        reward = group.scores[chosen].reward
        return make_row(group.prompt, response, prefix_len=len(response), reward=reward)


class RolloutFilter(SelectionRule):
    """Drop demonstrations whose prompt the model never solves (or always does), by the mean reward of its rollouts.

    A prompt of which no score is known is kept, and counted.
    """

    type: Literal["rollout_filter"]
    rollouts_per_prompt: int = Field(default=8, ge=1)
    min_mean_reward: float = 0.0
    """Prompts must have more than this."""
    max_mean_reward: float | None = None
    """And less than this; null: no upper bound."""

    @property
    def num_rollouts(self) -> int:
        return self.rollouts_per_prompt

    def keeps(self, rewards: Sequence[float]) -> bool:
        """Of the rewards that are known."""
        if not rewards:
            return True
        mean, bound = fmean(rewards), self.max_mean_reward
        return mean > self.min_mean_reward and (bound is None or mean < bound)

    def judge_rows(self, rows: Sequence[Sample], groups: Sequence[RolloutGroup]) -> Judged:
        rewards = {group.prompt.prompt_id: group.rewards for group in groups}
        kept = [row for row in rows if self.keeps(rewards[row.group_id])]
        dropped = {name: "not_selected" for name, known in rewards.items() if not self.keeps(known)}
        unknown = sum(not known for known in rewards.values())
        return Judged(kept, dropped, {"selection_unknown_prompts": float(unknown)})
