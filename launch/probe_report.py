"""What rates of the start model say about a recipe; docs/probe.md has the formulae."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import comb, exp, lgamma
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..engine.evaluation import accuracy_interval, pass_at_k, pass_at_powers
from ..rollouts.probe_table import REACHES, Rate
from .console import wide_console

if TYPE_CHECKING:
    from rich.table import Table

MEANINGS = {
    "solved": "every rollout right: little to learn",
    "learnable": "some right, some wrong: RL has a signal",
    "out_of_reach": "every rollout wrong: only a demonstration helps",
    "unknown": "scores are UNKNOWN, the others agree",
}


def signal_chance(scored: int, right: int, group_size: int) -> float:
    """Unbiased chance that `group_size` of the scored rollouts are neither all right nor all wrong.

    >>> signal_chance(scored=4, right=1, group_size=2)
    0.5
    """
    agree = comb(right, group_size) + comb(scored - right, group_size)
    return 1.0 - agree / comb(scored, group_size)


def failure_chance(scored: int, group_size: int) -> float:
    """Posterior chance that a whole new group fails, after `scored` rollouts that all did; prior Beta(1/2, 1/2).

    >>> round(failure_chance(scored=1, group_size=1), 12)
    0.75
    """
    logs = (
        lgamma(scored + group_size + 0.5)
        + lgamma(scored + 1.0)
        - lgamma(scored + group_size + 1.0)
        - lgamma(scored + 0.5)
    )
    return exp(logs)


@dataclass(frozen=True)
class ProbeReport:
    """Over all prompts probed; a number that does not exist is absent."""

    rates: Sequence[Rate]
    rollouts_per_prompt: int
    recipe_group: int | None
    """Of the recipe's algorithm; None where it has no rollouts."""

    @property
    def group_size(self) -> int:
        return self.recipe_group or self.rollouts_per_prompt

    @cached_property
    def pass_at(self) -> dict[str, float]:
        """pass@1, 2, 4, ... over prompts with so many known scores."""
        counts = [(r.scored, r.right) for r in self.rates if r.scored]
        if not counts:
            return {}
        once = fmean(pass_at_k(n, right, 1) for n, right in counts)
        return {"1": once, **pass_at_powers(counts)}

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the share of right rollouts."""
        counts = [(r.scored, r.right) for r in self.rates if r.scored]
        return accuracy_interval(counts) if counts else None

    @property
    def signal_share(self) -> float | None:
        """Groups of `group_size` that would carry a signal, over the prompts with so many known scores."""
        enough = [r for r in self.rates if r.scored >= self.group_size]
        if not enough:
            return None
        return fmean(signal_chance(r.scored, r.right, self.group_size) for r in enough)

    @property
    def traces_worth_buying(self) -> float:
        """Prompts without demonstration and without a right rollout, each times its chance to fail a group again."""
        lacking = [r for r in self.rates if r.is_failed and not r.has_demonstration]
        return sum(failure_chance(r.scored, self.group_size) for r in lacking)

    def to_json(self) -> dict[str, Any]:
        reaches = Counter(r.reach for r in self.rates)
        shown = Counter(r.reach for r in self.rates if r.has_demonstration)
        found: dict[str, Any] = {
            "prompts": len(self.rates),
            "rollouts_per_prompt": self.rollouts_per_prompt,
            "scored": sum(r.scored for r in self.rates),
            "right": sum(r.right for r in self.rates),
            "unknown": sum(r.unknown for r in self.rates),
            "classes": {reach: reaches[reach] for reach in REACHES},
            "with_demonstration": {reach: shown[reach] for reach in REACHES},
            "pass_at": self.pass_at,
            "group_size": self.group_size,
            "traces_worth_buying": self.traces_worth_buying,
        }
        if self.signal_share is not None:
            found["signal_share"] = self.signal_share
        if self.interval is not None:
            found["low"], found["high"] = self.interval
        return found

    def show(self) -> None:
        console = wide_console()
        console.print(self.table())
        console.print("\n".join(self.lines()), markup=False)

    def table(self) -> Table:
        from rich.table import Table

        facts = self.to_json()
        table = Table()
        table.add_column("class")
        for column in ("prompts", "share", "with demonstration"):
            table.add_column(column, justify="right")
        table.add_column("meaning")
        for reach in REACHES:
            n = facts["classes"][reach]
            if n or reach != "unknown":
                share = f"{n / len(self.rates):.1%}" if self.rates else "-"
                shown = str(facts["with_demonstration"][reach])
                table.add_row(reach, str(n), share, shown, MEANINGS[reach])
        return table

    def lines(self) -> list[str]:
        facts = self.to_json()
        lines = [
            f"{facts['scored']} rollouts scored, {facts['right']} of them right, {facts['unknown']} unknown"
        ]
        if self.interval is not None:
            values = "  ".join(f"pass@{k} {value:.3f}" for k, value in self.pass_at.items())
            low, high = self.interval
            lines.append(f"{values}  (share of right rollouts [{low:.3f}, {high:.3f}])")
        group = f"groups of {self.group_size}"
        if self.recipe_group is None:
            group += " (as probed; the recipe samples none)"
        if self.signal_share is not None:
            lines.append(f"{group}: {self.signal_share:.1%} carry a signal")
        else:
            lines.append(
                f"{group}: more than any prompt's known scores; probe with --rollouts-per-prompt {self.group_size}"
            )
        lines.append(
            f"traces worth buying: about {self.traces_worth_buying:.0f}, one for each prompt that has none and that a "
            "whole group would fail again"
        )
        return lines
