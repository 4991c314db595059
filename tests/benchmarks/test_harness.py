"""The rules of measurement, with clocks that only the sides move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from clock import Reading, disturbance
from figures import Figure, Interval, at_least, at_most
from harness import QUICK, Run, Session, Side, Work, clean_pairs, control_ratios, cost


class VirtualClock:
    def __init__(self) -> None:
        self.seconds = self.own = self.foreign = 0.0

    def now(self) -> float:
        return self.seconds

    def read(self) -> Reading:
        return Reading(self.seconds, self.own, self.own + self.foreign)


class Bench:
    """Two sides of known cost, with noise and drift that a seed decides."""

    def __init__(self, noise: float = 0.002, drift: float = 0.0, quick: bool = False) -> None:
        self.clock = VirtualClock()
        self.session = Session(self.clock, quick=quick)
        self.rng = np.random.default_rng(0)
        self.noise, self.drift = noise, drift
        self.order: list[str] = []
        self.amount = 0

    def side(self, name: str, seconds: float, amount: int = 10, foreign: Any = None) -> Side:
        def run(number: int) -> int:
            self.order.append(name)
            slower = 1 + self.drift * self.clock.seconds
            took = seconds * slower * float(np.exp(self.rng.normal(0, self.noise)))
            self.clock.seconds += took
            self.clock.own += 2 * took
            if foreign is not None:
                self.clock.foreign += next(foreign)
            return number

        return Side(name, run, prove=lambda given, result: Work(amount, str(result)))

    def compare(self, baseline: float, subject: float, **rules: Any) -> Figure:
        rules = {"seconds": 1e6, "target": at_least(1.0)} | rules
        sides = self.side("A", baseline), self.side("B", subject)
        return self.session.compare("speed", *sides, **rules)


def test_sides_run_in_turns_after_a_warm_up_that_does_not_count() -> None:
    bench = Bench()
    figure = bench.compare(1.0, 0.5)
    assert "".join(bench.order[:10]) == "AB" + "ABBAABBA"
    assert len(figure.values) == 12
    assert len(bench.order) == 2 + 2 * 12
    assert figure.verdict == "met"
    assert figure.found is not None
    assert figure.found.median == pytest.approx(2.0, abs=0.01)
    assert figure.found.low <= figure.found.median <= figure.found.high
    assert figure.cpu is not None
    assert figure.cpu.median == pytest.approx(2.0, abs=0.01)


def test_a_small_effect_needs_twenty_pairs() -> None:
    assert len(Bench().compare(1.0, 1.03).values) == 20


def test_a_drift_of_the_machine_hits_both_sides_alike() -> None:
    figure = Bench(drift=0.002).compare(1.0, 0.5)
    assert figure.verdict == "met"
    assert figure.found is not None
    assert figure.found.median == pytest.approx(2.0, abs=0.01)
    assert figure.control is not None
    assert figure.control.low <= 1.0 <= figure.control.high


def test_a_target_is_met_only_by_the_whole_interval() -> None:
    found = Interval(1.0, 0.97, 1.03)
    assert not at_least(0.98).met(found)
    assert at_least(0.97).met(found)
    assert not at_most(1.02).met(found)
    assert at_most(1.03).met(found)
    noisy = Bench(noise=0.02).compare(1.0, 0.5, target=at_least(2.0), control=1.0)
    assert noisy.found is not None
    assert noisy.found.low < 2.0
    assert noisy.verdict == "not met"


def test_noise_takes_more_pairs_until_the_control_holds() -> None:
    figure = Bench(noise=0.03).compare(1.0, 0.5)
    assert figure.verdict == "met"
    assert len(figure.values) > 12


def test_void_where_the_control_never_holds() -> None:
    figure = Bench(noise=0.3).compare(1.0, 0.5)
    assert figure.verdict == "void"
    assert "the same code against itself" in figure.void


def test_void_where_what_ran_before_matters() -> None:
    """B leaves the machine slow, so that A after B is no A after A: the control shows it."""
    bench = Bench(noise=0.0005)
    last = [""]

    def side(name: str) -> Side:
        def run(number: int) -> None:
            bench.clock.seconds += 1.2 if last[0] == "B" != name else 1.0
            last[0] = name

        return Side(name, run, prove=lambda given, result: Work(1, ""))

    figure = bench.session.compare("speed", side("A"), side("B"), seconds=1e6, target=at_least(0.9))
    assert figure.verdict == "void"


def test_void_where_the_time_is_over_too_soon() -> None:
    figure = Bench().compare(1.0, 0.5, seconds=10.0)
    assert figure.verdict == "void"
    assert figure.void == "only 6 of 12 undisturbed pairs in 10 s"


def test_void_beyond_a_physical_limit() -> None:
    faster = Bench().compare(1.0, 0.5, limit=1.9)
    assert faster.void == "beyond the physical limit of 1.9"
    cheaper = Bench().compare(1.0, 0.5, value=cost, target=at_most(1.0), limit=0.6)
    assert cheaper.void == "beyond the physical limit of 0.6"
    assert Bench().compare(1.0, 0.5, limit=2.0).verdict == "met"


def test_void_where_the_work_is_not_equal() -> None:
    bench = Bench()
    sides = bench.side("A", 1.0, amount=10), bench.side("B", 1.0, amount=9)
    figure = bench.session.compare("speed", *sides, seconds=1e6)
    assert figure.verdict == "void"
    assert figure.void.startswith("unequal work: A did 10")


def test_runs_that_others_disturbed_are_left_out_with_their_pair() -> None:
    def foreign() -> Iterator[float]:
        yield from (0, 0, 0, 0.5, 0, 0)  # the warm-up takes one, then the second pair is hit
        while True:
            yield 0

    bench = Bench()
    taken = foreign()
    sides = bench.side("A", 1.0, foreign=taken), bench.side("B", 0.5, foreign=taken)
    figure = bench.session.compare("speed", *sides, seconds=1e6, target=at_least(1.9))
    assert figure.verdict == "met"
    assert len(figure.values) == 12
    assert len(bench.order) == 2 + 2 * 13
    assert "1 pairs disturbed, e.g. others used 0.50 CPU-seconds" in figure.note


def test_what_disturbs() -> None:
    before = Reading(0.0, 0.0, 0.0)
    assert disturbance(before, Reading(10.0, 5.0, 5.9)) == ""
    assert "others" in disturbance(before, Reading(10.0, 5.0, 6.1))
    assert "stolen" in disturbance(before, Reading(1.0, 1.0, 1.0, stolen=0.5))


def test_control_compares_neighbours_of_the_same_code() -> None:
    work = Work(1, "")
    seconds = [(0, 1.0), (1, 5.0), (1, 4.0), (0, 2.0), (0, 1.0), (1, 8.0), (1, 4.0), (0, 1.0)]
    runs = [Run(side, took, 0.0, work) for side, took in seconds]
    assert control_ratios(runs) == [4 / 5, 2 / 1, 4 / 8]
    assert [(a.seconds, b.seconds) for a, b in clean_pairs(runs)] == [
        (1.0, 5.0),
        (2.0, 4.0),
        (1.0, 8.0),
        (1.0, 4.0),
    ]


def test_what_a_side_reads_from_its_result_replaces_the_clock() -> None:
    bench = Bench()
    fixed = iter([3.0, 1.0, *[3.0, 1.0, 1.0, 3.0] * 50])

    def side(name: str) -> Side:
        return Side(
            name, lambda n: next(fixed), prove=lambda g, r: Work(1, ""), took=lambda result: result
        )

    figure = bench.session.compare("p99", side("A"), side("B"), seconds=1e6, target=at_least(2.9))
    assert figure.found == Interval(3.0, 3.0, 3.0)


def test_work_is_the_tokens_in_any_order() -> None:
    assert Work.of([[1, 2, 3], [4]]) == Work.of([(4,), (1, 2, 3)])
    assert Work.of([[1, 2, 3], [4]]).amount == 4
    assert Work.of([[1, 2], [3, 4]]) != Work.of([[1, 2, 3], [4]])
    assert Work.of([[1, 2], [3, 4]]) != Work.of([[1, 2], [3, 5]])


def test_repetitions_counts_and_trials() -> None:
    bench = Bench()
    numbers: list[int] = []

    def take(number: int) -> float:
        numbers.append(number)
        return float(number)

    figure = bench.session.sample("ms", take, seconds=10.0, unit="ms", target=at_most(9.0))
    assert numbers == [-1, *range(12)]
    assert figure.found is not None
    assert figure.found.median == 5.5
    assert bench.session.count("padding", 0.99, target=at_least(0.98)).verdict == "met"
    assert bench.session.derive("slope", [1.0, 2.0]).verdict == "void"
    quick = Bench(quick=True)
    assert quick.compare(1.0, 0.5).void
    assert len(quick.order) == 2 + 2 * 2
    assert quick.session.count("padding", 0.99).void == QUICK


def test_every_figure_is_kept_at_once() -> None:
    kept: list[int] = []
    session = Session(VirtualClock(), keep=lambda figures: kept.append(len(figures)))
    session.count("padding", 0.99)
    session.fail("peer", "not installed")
    assert kept == [1, 2]
    assert session.figures[1].verdict == "void"


def test_repeated_work_is_timed_once() -> None:
    bench = Bench()
    ten = replace(bench.side("A", 10.0), repeats=10)
    figure = bench.session.compare("speed", ten, bench.side("B", 0.5), seconds=1e6)
    assert figure.found is not None
    assert figure.found.median == pytest.approx(2.0, abs=0.01)


def test_figures_survive_json() -> None:
    figure = Bench().compare(1.0, 0.5, unit="x", note="both warm")
    assert Figure.from_json(figure.to_json()) == figure
