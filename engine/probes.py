"""A gradient that is measured and thrown away: what is asked of the learner, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from .types import Source, TrainBatch


@dataclass(frozen=True, slots=True, eq=False)
class GradientProbe:
    """A gradient to measure and throw away: of one minibatch, as one optimizer step would compute it."""

    name: str
    batch: TrainBatch
    """Annotated and finished."""
    loss: str
    coefs: Mapping[str, float]
    only: Source | None = None
    """Differentiate through this source's tokens only; the two parts add up to the whole gradient."""


@dataclass(frozen=True, slots=True)
class GradientComparison:
    """Dot products between the gradients of several probes, over all trained parameters.

    >>> found = GradientComparison(("expert", "policy"), ((4.0, 3.0), (3.0, 9.0)), ({}, {}))
    >>> found.norm("policy"), found.cosine("expert", "policy"), found.share("expert", "policy")
    (3.0, 0.5, 0.4)
    """

    names: tuple[str, ...]
    gram: tuple[tuple[float, ...], ...]
    metrics: tuple[Mapping[str, float], ...]
    """The loss and its metrics, by probe; of the whole loss also where a probe differentiates one source."""

    @property
    def is_finite(self) -> bool:
        """False where a loss or a gradient is not: nothing can be said of any of them then."""
        return all(isfinite(value) for row in self.gram for value in row)

    def dot(self, one: str, other: str) -> float:
        return self.gram[self.names.index(one)][self.names.index(other)]

    def norm(self, name: str) -> float:
        return self.dot(name, name) ** 0.5

    def cosine(self, one: str, other: str) -> float | None:
        """None where either gradient is zero."""
        norms = self.norm(one) * self.norm(other)
        return self.dot(one, other) / norms if norms else None

    def share(self, one: str, other: str) -> float | None:
        """|one| / (|one| + |other|); None where both are zero."""
        total = self.norm(one) + self.norm(other)
        return self.norm(one) / total if total else None
