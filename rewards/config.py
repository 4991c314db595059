"""The recipe's `reward` section."""

from pydantic import Field

from ..engine.config import Section


class RewardConfig(Section):
    """`reward: math` is short for `reward: {function: math}`."""

    function: str
    """Name in `plait.rewards.REWARDS`, or `module:function` of your own."""
    num_workers: int = Field(default=2, ge=1)
    """Scoring processes."""
    timeout_seconds: float = Field(default=10.0, gt=0)
    """Deadline of one call; exceeding it kills the process and makes the score UNKNOWN."""
    max_memory_mib: int = Field(default=2048, ge=64)
    """Address space a scoring process may add to what it has after loading the function."""
    max_unknown_fraction: float = Field(default=0.2, ge=0, le=1)
    """Largest share of UNKNOWN scores in one step; above it the run stops."""
