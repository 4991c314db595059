"""What `plait compare` found: numbers by method over its seeds, as report.json, report.md and curves.svg."""

from __future__ import annotations

import json
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .compare import Budget, Outcome
from .compare_chart import Curve, draw_curves
from .run import package_versions


@dataclass(frozen=True)
class Point:
    """One evaluation: after so many steps, trained tokens and seconds of steps."""

    step: int
    tokens: int
    seconds: float
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class SeedResult:
    """One run. Tokens: trained (policy, expert) and sampled to train on; seconds: of the steps, and of everything."""

    seed: int
    folder: str
    before: float | None = None
    after: float | None = None
    policy_tokens: int | None = None
    expert_tokens: int | None = None
    generated_tokens: int | None = None
    step_seconds: float | None = None
    total_seconds: float | None = None
    steps: int | None = None
    prompts: int | None = None
    expert_stream: int | None = None
    ended_by: str = ""
    failure: str = ""
    curve: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1); None for the latter where there is one value."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(fmean(values), stdev(values) if len(values) > 1 else None)

    def percent(self) -> str:
        spread = "" if self.deviation is None else f" ± {100 * self.deviation:.1f}"
        return f"{100 * self.mean:.1f}{spread}"

    def count(self) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:,.0f}"
        return f"{self.mean:,.0f}{spread}"


@dataclass(frozen=True)
class MethodResult:
    label: str
    runs: tuple[SeedResult, ...]

    @property
    def finished(self) -> tuple[SeedResult, ...]:
        return tuple(run for run in self.runs if not run.failure)

    def spread(self, field: str) -> Spread | None:
        """Over the finished runs that have the number."""
        values = [v for run in self.finished if (v := getattr(run, field)) is not None]
        return Spread.of(values) if values else None


def collect(outcomes: Sequence[Outcome]) -> list[MethodResult]:
    """Methods in the order they were named, each with its seeds in order."""
    by_label: dict[str, list[SeedResult]] = defaultdict(list)
    for outcome in outcomes:
        by_label[outcome.entry.label].append(seed_result(outcome))
    return [MethodResult(label, tuple(runs)) for label, runs in by_label.items()]


def seed_result(outcome: Outcome) -> SeedResult:
    recipe, summary = outcome.entry.recipe, outcome.summary
    folder = f"runs/{recipe.run.name}"
    if summary is None:
        return SeedResult(outcome.entry.seed, folder, failure=outcome.failure)
    before, after, tokens = summary["eval_before"], summary["eval_after"], summary["tokens"]
    return SeedResult(
        seed=outcome.entry.seed,
        folder=folder,
        before=before["accuracy"] if before else None,
        after=after["accuracy"] if after else None,
        policy_tokens=tokens["policy"],
        expert_tokens=tokens["expert"],
        generated_tokens=tokens["generated"],
        step_seconds=summary["step_seconds"],
        total_seconds=summary["wall_seconds"]["total"],
        steps=summary["steps"],
        prompts=summary["prompts"],
        expert_stream=summary["expert_stream"],
        ended_by=summary["ended_by"],
        curve=tuple(read_curve(recipe.folder / "metrics.jsonl")),
    )


def read_curve(metrics: Path) -> list[Point]:
    """The evaluations of a run, each with what had been trained when it was made."""
    points, tokens, seconds = [], 0, 0.0
    for line in metrics.read_text().splitlines():
        row = json.loads(line)
        tokens = row.get("tokens/trained_so_far", tokens)
        seconds = row.get("time/steps_so_far", seconds)
        if "eval/accuracy" in row:
            place = (row["step"], tokens, seconds)
            points.append(Point(*place, row["eval/accuracy"], row["eval/low"], row["eval/high"]))
    return points


def write_report(
    outcomes: Sequence[Outcome], budget: Budget, command: str, recipe_name: str, output: Path
) -> list[MethodResult]:
    """Write report.json, report.md and curves.svg into `output`."""
    methods = collect(outcomes)
    recipe = outcomes[0].entry.recipe
    facts = {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "recipe": recipe_name,
        "model": recipe.model.path,
        "data": recipe.data.model_dump(mode="json", exclude={"seed"}),
        "budget": asdict(budget),
        "held_out_prompts": recipe.eval.num_prompts,
        "steps_of_schedules": recipe.loop.steps,
        "versions": package_versions(),
    }
    content = {**facts, "methods": [{**asdict(m), "mean": means(m)} for m in methods]}
    (output / "report.json").write_text(json.dumps(content, indent=2) + "\n")
    chart = draw_curves(learning_curves(methods, budget.kind), x_label=AXES[budget.kind])
    (output / "curves.svg").write_text(chart)
    (output / "report.md").write_text(markdown(methods, facts, str(budget)))
    return methods


AXES = {"tokens": "trained tokens", "seconds": "seconds of steps"}
MEANS = (
    "before",
    "after",
    "policy_tokens",
    "expert_tokens",
    "generated_tokens",
    "step_seconds",
    "total_seconds",
    "steps",
    "prompts",
)


def means(method: MethodResult) -> dict[str, Any]:
    spreads = {name: method.spread(name) for name in MEANS}
    return {name: asdict(spread) for name, spread in spreads.items() if spread}


def learning_curves(methods: Sequence[MethodResult], kind: str) -> list[Curve]:
    """Per method its runs' points, and their mean at the evaluations that every finished run has."""
    curves = []
    for method in methods:
        runs = [[(getattr(p, kind), p.accuracy) for p in run.curve] for run in method.finished]
        if runs:
            shared = zip(*runs, strict=False)  # runs may end at different steps
            mean = [(fmean(x for x, _ in at), fmean(y for _, y in at)) for at in shared]
            curves.append(Curve(method.label, mean, runs))
    return curves


def markdown(methods: Sequence[MethodResult], facts: Mapping[str, Any], budget: str) -> str:
    seeds = max(len(method.runs) for method in methods)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"# Comparison on {facts['recipe']}",
        "",
        f"Each method: {budget} from the same model, `{facts['model']}`; {seeds} seed(s); accuracy on "
        f"{facts['held_out_prompts']} held-out prompts in percent, mean ± standard deviation over seeds, "
        "then each seed's. A run ends after the step that reaches the budget.",
        "",
        "| method | before | after | each seed | policy tokens | expert tokens | generated tokens "
        "| seconds of steps | seconds in all | steps | prompts drawn |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *[table_row(method) for method in methods],
        "",
    ]
    for method in methods:
        lines += [
            f"* {method.label}, seed {run.seed}: failed: {run.failure}"
            for run in method.runs
            if run.failure
        ]
        lines += [
            f"* {method.label}, seed {run.seed}: all {run.steps} steps of `loop.steps` came before the budget was spent"
            for run in method.finished
            if run.ended_by == "steps"
        ]
    lines += [
        "",
        "![learning curves](curves.svg)",
        "",
        f"Made {facts['date']} with {versions} by",
        "",
        f"    {facts['command']}",
        "",
    ]
    return "\n".join(lines)


def table_row(method: MethodResult) -> str:
    if not method.finished:
        reason = textwrap.shorten(method.runs[0].failure, 100, placeholder=" ...")
        return f"| {method.label} | failed: {reason.replace('|', '/')} |" + " |" * 9
    before, after = method.spread("before"), method.spread("after")
    each = ", ".join(
        "failed" if run.failure else f"{100 * run.after:.1f}" if run.after is not None else "-"
        for run in method.runs
    )
    cells = [method.label, before.percent() if before else "-", after.percent() if after else "-"]
    counts = [method.spread(name) for name in MEANS[2:]]
    cells += [each, *(spread.count() if spread else "-" for spread in counts)]
    return f"| {' | '.join(cells)} |"
