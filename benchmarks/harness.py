"""The rules of measurement, enforced: a Session takes figures, and a figure that broke a rule is void.

    session.compare("batch", baseline, subject, target=at_least(0.97), seconds=120)

* Both sides run in turns, A B B A A B B A ..., so that a slow drift of the machine hits both alike.
* At least 12 pairs, 20 where the effect is below 5 %; the figure is the median of the pairs' ratios with a bootstrap
  95 % interval, and a target is met only if the whole interval passes.
* **Control**: in A B B A every run but the first and the last of all has a neighbour that ran the same code. Ratios of
  such neighbours are as far apart in time as the pairs are; their median's interval must contain 1.00 and lie in
  [0.98, 1.02]. Until it does, more pairs are taken as far as the time goes; then the figure is void.
* Both sides of a pair must prove equal work: as many tokens, and the same ones.
* Runs during which other processes or machines took the CPU are left out with their pair, and counted.
* A first run of each side warms up and is not counted. CPU-seconds are kept beside wall time.
* An interval that lies wholly beyond a physical limit is an error of the measurement, so the figure is void.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from clock import Clock, MachineClock, disturbance
from figures import Figure, Interval, Target

MIN_PAIRS, MIN_PAIRS_SMALL_EFFECT, MAX_PAIRS = 12, 20, 100
SMALL_EFFECT = 0.05
CONTROL = 0.02
QUICK_PAIRS = 2
QUICK = "a trial of the code, too short to be a measurement"

Value = Callable[[float, float], float]
"""(what the baseline took, what the subject took) -> the figure's value for one pair."""


def speedup(baseline: float, subject: float) -> float:
    return baseline / subject


def cost(baseline: float, subject: float) -> float:
    return subject / baseline


@dataclass(frozen=True, slots=True)
class Work:
    """What a run did: how much, and a digest that tells whether two runs did the same."""

    amount: int
    digest: str

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Work:
        """Rows of token ids, in any order."""
        arrays = sorted(np.asarray(row, np.int64).tobytes() for row in rows)
        whole = blake2b(digest_size=8)
        for array in arrays:
            whole.update(len(array).to_bytes(8) + array)
        return cls(sum(map(len, arrays)) // 8, whole.hexdigest())


class UnequalWork(Exception):
    """The two sides of a pair did not do the same."""


def itself(number: int) -> Any:
    return number


@dataclass(frozen=True)
class Side:
    """One of two ways to do the same work."""

    name: str
    run: Callable[[Any], Any]
    """What is timed; gets what `prepare` made."""
    prove: Callable[[Any, Any], Work]
    """(input, result of `run`) -> the work that was done; not timed."""
    prepare: Callable[[int], Any] = itself
    """Number of the pair -> input, equal in cost for every number; not timed."""
    took: Callable[[Any], float] | None = None
    """Reads from the result what is compared, where that is not the time of `run`."""
    repeats: int = 1
    """How often `run` does the work that it proves, where once is too short to be timed."""


@dataclass(frozen=True, slots=True)
class Run:
    side: int
    seconds: float
    """Or what Side.took said."""
    cpu_seconds: float
    work: Work
    disturbed: str = ""


@dataclass(frozen=True, slots=True)
class Rules:
    """What one comparison asks for."""

    seconds: float
    """How long it may take, warm-up included."""
    target: Target | None = None
    value: Value = speedup
    limit: float | None = None
    """No value can be better: physics."""
    control: float = CONTROL


class Session:
    """Takes the figures of one benchmark."""

    def __init__(
        self,
        clock: Clock | None = None,
        *,
        quick: bool = False,
        keep: Callable[[Sequence[Figure]], object] = lambda figures: None,
    ) -> None:
        """`quick`: two pairs each, and no figure counts: to see that the code works.

        `keep` gets all figures so far whenever there is one more.
        """
        self.clock = clock or MachineClock()
        self.quick = quick
        self.figures: list[Figure] = []
        self._keep = keep

    def compare(
        self,
        name: str,
        baseline: Side,
        subject: Side,
        *,
        seconds: float,
        target: Target | None = None,
        value: Value = speedup,
        limit: float | None = None,
        control: float = CONTROL,
        unit: str = "",
        note: str = "",
    ) -> Figure:
        """A ratio of two sides; see Rules. `control` is wider only for what is no mean, and `note` says so."""
        rules = Rules(seconds, target, value, limit, control)
        runs: list[Run] = []
        problem = ""
        try:
            self._take_pairs((baseline, subject), rules, runs)
        except UnequalWork as error:
            problem = str(error)
        figure = self._judge(Figure(name, None, target, unit, note=note), runs, rules)
        return self._add(replace(figure, void=problem or figure.void))

    def sample(
        self,
        name: str,
        take: Callable[[int], float],
        *,
        seconds: float,
        target: Target | None = None,
        unit: str = "",
        note: str = "",
        repetitions: int = MIN_PAIRS,
        value: Callable[[float], float] = lambda number: number,
    ) -> Figure:
        """A number of its own, no ratio of sides: repeated, the first time not counted."""
        end = self.clock.now() + seconds
        take(-1)
        wanted = QUICK_PAIRS if self.quick else repetitions
        values: list[float] = []
        while len(values) < wanted and (self.clock.now() < end or len(values) < QUICK_PAIRS):
            values.append(value(take(len(values))))
        void = (
            "" if len(values) == wanted else f"only {len(values)} of {wanted} repetitions in time"
        )
        found = Interval.of(values)
        return self._add(Figure(name, found, target, unit, tuple(values), void=void, note=note))

    def derive(
        self,
        name: str,
        values: Sequence[float],
        *,
        target: Target | None = None,
        unit: str = "",
        note: str = "",
        at_least: int = 5,
    ) -> Figure:
        """Of repetitions that were taken elsewhere: `values`, one for each."""
        few = f"only {len(values)} of {at_least} repetitions" if len(values) < at_least else ""
        found = Interval.of(values) if values else None
        return self._add(Figure(name, found, target, unit, tuple(values), void=few, note=note))

    def count(
        self,
        name: str,
        value: float,
        *,
        target: Target | None = None,
        unit: str = "",
        note: str = "",
    ) -> Figure:
        """A number that does not depend on time."""
        return self._add(Figure(name, Interval.exactly(value), target, unit, (value,), note=note))

    def fail(self, name: str, reason: str, target: Target | None = None) -> Figure:
        """Nothing could be measured."""
        return self._add(Figure(name, None, target, void=reason))

    def _add(self, figure: Figure) -> Figure:
        if self.quick:
            figure = replace(figure, void=figure.void or QUICK)
        self.figures.append(figure)
        self._keep(self.figures)
        print(f"{figure.name}: {figure.measured} {figure.found or ''} {figure.void}", flush=True)
        return figure

    def _take_pairs(self, sides: tuple[Side, Side], rules: Rules, runs: list[Run]) -> None:
        end = self.clock.now() + rules.seconds
        warm = [self._take(sides[0], 0, -1), self._take(sides[1], 1, -1)]
        check_equal(sides, warm[0], warm[1])
        for number in range(QUICK_PAIRS if self.quick else MAX_PAIRS):
            if len(runs) >= 2 * QUICK_PAIRS and (self.clock.now() > end or enough(runs, rules)):
                return
            order: tuple[Literal[0, 1], ...] = (0, 1) if number % 2 == 0 else (1, 0)
            pair = [self._take(sides[side], side, number) for side in order]
            runs += pair
            check_equal(sides, *sorted(pair, key=lambda run: run.side))

    def _take(self, side: Side, index: int, number: int) -> Run:
        given = side.prepare(number)
        before = self.clock.read()
        started = self.clock.now()
        result = side.run(given)
        seconds = (self.clock.now() - started) / side.repeats
        after = self.clock.read()
        if side.took is not None:
            seconds = side.took(result)
        disturbed = "" if self.quick else disturbance(before, after)
        cpu_seconds = (after.own - before.own) / side.repeats
        return Run(index, seconds, cpu_seconds, side.prove(given, result), disturbed)

    def _judge(self, figure: Figure, runs: Sequence[Run], rules: Rules) -> Figure:
        pairs = clean_pairs(runs)
        if not pairs:
            return replace(figure, void="no pair was undisturbed" if runs else "not begun")
        values = tuple(rules.value(a.seconds, b.seconds) for a, b in pairs)
        figure = replace(figure, found=Interval.of(values), values=values)
        if all(a.cpu_seconds > 0 and b.cpu_seconds > 0 for a, b in pairs):
            cpu = [rules.value(a.cpu_seconds, b.cpu_seconds) for a, b in pairs]
            figure = replace(figure, cpu=Interval.of(cpu))
        ratios = control_ratios(runs)
        if ratios:
            figure = replace(figure, control=Interval.of(ratios))
        reasons = Counter(run.disturbed for run in runs if run.disturbed)
        if reasons:
            left_out = f"{len(runs) // 2 - len(pairs)} pairs disturbed, e.g. {next(iter(reasons))}"
            figure = replace(figure, note="; ".join(filter(None, [figure.note, left_out])))
        return replace(figure, void=why_void(figure, len(pairs), rules))


def check_equal(sides: tuple[Side, Side], baseline: Run, subject: Run) -> None:
    if baseline.work != subject.work:
        raise UnequalWork(
            f"unequal work: {sides[0].name} did {baseline.work.amount} ({baseline.work.digest}), "
            f"{sides[1].name} {subject.work.amount} ({subject.work.digest})"
        )


def clean_pairs(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """(baseline, subject) of each pair that nobody disturbed."""
    pairs = (sorted(runs[i : i + 2], key=lambda run: run.side) for i in range(0, len(runs) - 1, 2))
    return [(a, b) for a, b in pairs if not (a.disturbed or b.disturbed)]


def control_ratios(runs: Sequence[Run]) -> list[float]:
    """Of neighbours that ran the same code: first over second for A A, second over first for B B.

    So a drift cancels, as it does in the pairs, but what a run leaves behind for the next one does not.
    """
    ratios = []
    for one, other in pairwise(runs):
        if one.side == other.side and not (one.disturbed or other.disturbed):
            ratio = one.seconds / other.seconds
            ratios.append(1 / ratio if one.side else ratio)
    return ratios


def control_holds(runs: Sequence[Run], width: float) -> bool:
    ratios = control_ratios(runs)
    return bool(ratios) and inside(Interval.of(ratios), width)


def inside(control: Interval, width: float) -> bool:
    """Contains 1.00, and no end is farther than `width` from it."""
    return 1 - width <= control.low <= 1.0 <= control.high <= 1 + width


def pairs_wanted(values: Sequence[float], value: Value) -> int:
    """12, or 20 where the effect is small; the effect is the distance from what two equal sides would give."""
    neutral = value(1.0, 1.0)
    small = abs(float(np.median(values)) - neutral) < SMALL_EFFECT
    return MIN_PAIRS_SMALL_EFFECT if small else MIN_PAIRS


def enough(runs: Sequence[Run], rules: Rules) -> bool:
    pairs = clean_pairs(runs)
    if len(pairs) < MIN_PAIRS:
        return False
    values = [rules.value(a.seconds, b.seconds) for a, b in pairs]
    return len(pairs) >= pairs_wanted(values, rules.value) and control_holds(runs, rules.control)


def why_void(figure: Figure, num_pairs: int, rules: Rules) -> str:
    assert figure.found is not None
    wanted = pairs_wanted(figure.values, rules.value)
    if num_pairs < wanted:
        return f"only {num_pairs} of {wanted} undisturbed pairs in {rules.seconds:g} s"
    if figure.control is None or not inside(figure.control, rules.control):
        return f"the same code against itself: {figure.control}"
    target, limit = rules.target, rules.limit
    if limit is not None and target is not None and target.beyond(figure.found, limit):
        return f"beyond the physical limit of {limit:g}"
    return ""
