"""The recipe's `reward` section."""

import json
from typing import Any

from pydantic import Field, model_validator

from ..engine.config import Section


class ShapingConfig(Section):
    """One function whose number, times `weight`, is added to the reward for training."""

    function: str
    """Name in `plait.rewards.REWARDS`, or `module:function` of your own."""
    weight: float
    options: dict[str, Any] = Field(default={})
    """Keyword arguments of the function."""


class RewardConfig(Section):
    """`reward: math` is short for `reward: {function: math}`."""

    function: str
    """The verifier: a name in `plait.rewards.REWARDS`, or `module:function` of your own."""
    options: dict[str, Any] = Field(default={})
    """Keyword arguments of the function."""
    shaping: list[ShapingConfig] = Field(default=[])
    """What is added to the verifier's reward where rewards become advantages; docs/rewards.md."""
    overlong_buffer: int | None = Field(default=None, ge=1)
    """Tokens before rollouts.max_response_length over which `overlong_penalty` rises from 0 (DAPO); null: none."""
    overlong_penalty: float = Field(default=1.0, gt=0)
    """What a response of max_response_length tokens loses."""
    num_workers: int = Field(default=2, ge=1)
    """Scoring processes."""
    timeout_seconds: float = Field(default=10.0, gt=0)
    """Deadline of one call; exceeding it kills the process and makes the score UNKNOWN."""
    max_memory_mib: int = Field(default=2048, ge=64)
    """Address space a scoring process may add to what it has after loading the function."""
    max_unknown_fraction: float = Field(default=0.2, ge=0, le=1)
    """Largest share of UNKNOWN scores in one step; above it the run stops."""

    gold_samples: int = Field(default=16, ge=0)
    """Prompts whose gold answer, and a corrupted one, are graded before the first step; 0: none."""
    max_gold_failures: float = Field(default=0.1, ge=0, le=1)
    """Share of them that may come out wrong; above it the run does not start."""

    @model_validator(mode="after")
    def _parts_are_different_and_plain(self) -> "RewardConfig":
        names = [self.function, *(part.function for part in self.shaping)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]!r} is named twice; add the weights up")
        for options in (self.options, *(part.options for part in self.shaping)):
            try:
                json.dumps(options, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(f"options must be plain data: {error}") from error
        return self
