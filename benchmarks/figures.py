"""What a benchmark found: a number with its interval, its target, and whether it may be believed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Interval:
    """A median and the bootstrap 95 % interval of it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], seed: int = 0) -> Interval:
        """Of independent repetitions; ValueError without any."""
        if not values:
            raise ValueError("no repetition")
        rng = np.random.default_rng(seed)
        medians = np.median(rng.choice(values, size=(RESAMPLES, len(values))), axis=1)
        low, high = np.percentile(medians, [2.5, 97.5])
        return cls(float(statistics.median(values)), float(low), float(high))

    @classmethod
    def exactly(cls, value: float) -> Interval:
        """A count, which the next run would find again."""
        return cls(value, value, value)

    def __str__(self) -> str:
        return f"[{show(self.low)}, {show(self.high)}]"


@dataclass(frozen=True, slots=True)
class Target:
    sign: Literal[">=", "<="]
    value: float

    def met(self, found: Interval) -> bool:
        """The whole interval must pass, not the median alone."""
        return found.low >= self.value if self.sign == ">=" else found.high <= self.value

    def beyond(self, found: Interval, limit: float) -> bool:
        """All of the interval is better than `limit`."""
        return found.low > limit if self.sign == ">=" else found.high < limit

    def __str__(self) -> str:
        return f"{self.sign} {self.value:g}"


def at_least(value: float) -> Target:
    return Target(">=", value)


def at_most(value: float) -> Target:
    return Target("<=", value)


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table."""

    name: str
    found: Interval | None
    """None: nothing could be measured."""
    target: Target | None = None
    unit: str = ""
    """"" for a ratio."""
    values: tuple[float, ...] = ()
    """Of every pair or repetition that counts."""
    control: Interval | None = None
    """Ratio of neighbouring runs of the same code."""
    cpu: Interval | None = None
    """The same ratio in CPU-seconds."""
    void: str = ""
    """Why it may not be believed."""
    note: str = ""

    @property
    def verdict(self) -> Literal["met", "not met", "void", ""]:
        if self.void or self.found is None:
            return "void"
        if self.target is None:
            return ""
        return "met" if self.target.met(self.found) else "not met"

    @property
    def measured(self) -> str:
        return "-" if self.found is None else f"{show(self.found.median)} {self.unit}".strip()

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Figure:
        fields: dict[str, Any] = {name: data[name] for name in cls.__slots__}
        for name in ("found", "control", "cpu"):
            fields[name] = fields[name] and Interval(**fields[name])
        fields["target"] = fields["target"] and Target(**fields["target"])
        fields["values"] = tuple(fields["values"])
        return cls(**fields)


def show(value: float) -> str:
    """Three decimals of a ratio near 1, else three digits that count."""
    if 0.1 <= abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
