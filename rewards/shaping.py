"""What is added to a verifier's reward for training: other functions, weighted, and the price of long responses."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..engine.types import Score
from .config import ShapingConfig

OVERLONG = "overlong"


def overlong_penalty(length: int, max_length: int, buffer: int, penalty: float = 1.0) -> float:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, equation 13) of a response of `length` tokens, at most 0.

    0 up to max_length - buffer tokens, from there linearly down to -penalty at max_length.

    >>> [overlong_penalty(length, max_length=100, buffer=20) for length in (80, 90, 100)]
    [0.0, -0.5, -1.0]
    """
    over = length - (max_length - buffer)
    return -penalty * min(max(over / buffer, 0.0), 1.0)


def shaped(
    verdict: Score,
    parts: Sequence[tuple[ShapingConfig, Score]],
    extra: Mapping[str, float],
) -> Score:
    """The verdict with its shaping: the weighted numbers of `parts`, and `extra` as it is.

    Each number is a part of the score under its name. Where one of them is UNKNOWN, all of it is.
    """
    if verdict.reward is None:
        return verdict
    numbers, total = dict(extra), sum(extra.values())
    for config, score in parts:
        if score.reward is None:
            return Score.unknown(f"shaping {config.function}: {score.reason}")
        numbers[config.function] = score.reward
        total += config.weight * score.reward
    return replace(verdict, parts={**verdict.parts, **numbers}, shaping=total)
