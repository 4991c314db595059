"""Polychromic objectives: rollouts are valued in sets, by what they earn and by how many answers they hold
(arXiv 2509.25424).

Objective: grpo's, a clipped surrogate over POLICY tokens - entropy_coef x entropy + kl_coef x KL, with set advantages.
For a set S of `set_size` rollouts of one prompt

    f(S) = mean reward x (distinct answers in S / set_size)

A set's advantage is f minus its mean over the group's sets; a row's is the mean over the sets that contain it, 0 where
none does.

Departs from the paper: the prompt is the only state that branches; no critic, no KL at each state. Two rollouts are
different where their final answers are (Score.answer). The paper draws its sets; here all of them are taken where there
are at most `max_sets_per_group`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, count
from math import comb
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from ..engine.errors import DataError
from ..engine.types import RolloutGroup, Sample, StepPlan, Update
from .advantages import center
from .base import Setup, SurrogateFields, drop_uniform, rollout_rows
from .draws import uniforms
from .grpo import GrpoBase
from .losses import Normalizer

Set = tuple[int, ...]
"""Places of its rows in the group, ascending."""


class PolychromicConfig(SurrogateFields):
    type: Literal["polychromic"] = "polychromic"
    set_size: int = Field(default=4, ge=1)
    """n in the paper."""
    max_sets_per_group: int = Field(default=64, ge=1)
    """Where a group has more sets, this many are drawn."""
    normalizer: Normalizer = "rows"

    @model_validator(mode="after")
    def _sets_differ(self) -> PolychromicConfig:
        if self.set_size >= self.rollouts_per_prompt:
            raise ValueError(
                f"set_size = {self.set_size} leaves one set in a group of rollouts_per_prompt = "
                f"{self.rollouts_per_prompt}, and every advantage is 0; lower set_size, or raise rollouts_per_prompt"
            )
        return self


@dataclass(frozen=True)
class SetCredit:
    """One group: three numbers a set, one a row."""

    diversities: list[float]
    """Distinct answers / set_size."""
    objectives: list[float]
    set_advantages: list[float]
    advantages: list[float]


def all_sets(num_rows: int, set_size: int) -> list[Set]:
    """All combinations in lexicographic order; one set of all rows where there are fewer than `set_size`."""
    return list(combinations(range(num_rows), min(set_size, num_rows)))


def choose_sets(num_rows: int, config: PolychromicConfig, *key: int | str) -> list[Set]:
    """All sets, or `max_sets_per_group` different ones drawn by `key`."""
    size, wanted = config.set_size, config.max_sets_per_group
    if comb(num_rows, size) <= wanted:
        return all_sets(num_rows, size)
    chosen: dict[Set, None] = {}
    for attempt in count():
        draws = np.asarray(uniforms(wanted * num_rows, *key, attempt)).reshape(wanted, num_rows)
        chosen |= dict.fromkeys(tuple(sorted(row)) for row in draws.argsort()[:, :size].tolist())
        if len(chosen) >= wanted:
            break
    return list(chosen)[:wanted]


def credit_sets(
    rewards: Sequence[float], signatures: Sequence[str], sets: Sequence[Set], set_size: int
) -> SetCredit:
    """Objectives and advantages of one group. A lone set has advantage 0; equal objectives have exactly 0."""
    diversities = [len({signatures[i] for i in rows}) / set_size for rows in sets]
    means = [sum(rewards[i] for i in rows) / len(rows) for rows in sets]
    objectives = [mean * diversity for mean, diversity in zip(means, diversities, strict=True)]
    centered = center(objectives) if len(sets) > 1 else [0.0] * len(sets)
    of_row: list[list[float]] = [[] for _ in rewards]
    for rows, advantage in zip(sets, centered, strict=True):
        for i in rows:
            of_row[i].append(advantage)
    advantages = [sum(a) / len(a) if a else 0.0 for a in of_row]
    return SetCredit(diversities, objectives, centered, advantages)


class Polychromic(GrpoBase):
    Config = PolychromicConfig

    def __init__(self, config: PolychromicConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.set_diversity: float | None = None

    def assemble(
        self, plan: StepPlan, groups: Sequence[RolloutGroup], step: int
    ) -> Sequence[Update]:
        return [self.update(self.credit(rollout_rows(groups), step), self.coefs(step))]

    def credit(self, samples: Sequence[Sample], step: int = 0) -> list[Sample]:
        """Set advantages on POLICY tokens; rows without a reward are in no set.

        Raises DataError where a scored row has no answer.
        """
        places: dict[str, list[int]] = {}
        for i, sample in enumerate(samples):
            if sample.reward is not None:
                places.setdefault(sample.group_id, []).append(i)
        rows, diversities = list(samples), list[float]()
        for group, members in places.items():
            rewards = [r for i in members if (r := samples[i].shaped_reward) is not None]
            answers = [answer_of(samples[i]) for i in members]
            key = (self.setup.seed, "polychromic", step, group)
            sets = choose_sets(len(members), self.config, *key)
            found = credit_sets(rewards, answers, sets, self.config.set_size)
            for i, advantage in zip(members, found.advantages, strict=True):
                rows[i] = samples[i].with_advantage(advantage)
            diversities += found.diversities
        self.set_diversity = sum(diversities) / len(diversities) if diversities else None
        return drop_uniform(rows, self.config)

    def metrics(self) -> Mapping[str, float]:
        """set_diversity: distinct answers of a set / set_size, mean over the sets of the last step."""
        return {} if self.set_diversity is None else {"set_diversity": self.set_diversity}


def answer_of(sample: Sample) -> str:
    """Raises DataError naming the prompt where the reward told no answer."""
    if sample.signature is None:
        raise DataError(
            f"prompt {sample.group_id!r}: the reward of a rollout came without its answer, and polychromic counts "
            "different answers; use math, boxed_math, exact or reasoning_gym, or return Score.ok(reward, answer=...)"
        )
    return sample.signature
