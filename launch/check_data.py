"""`plait check data`: every row read, encoded, examined and graded as a run would, without a cluster."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..rollouts.admission_report import AdmissionReport
from ..rollouts.quarantine import append
from .admission import Admission, examine, finding_rows, objections, quarantined
from .config import Recipe
from .console import wide_console
from .model import resolve_model
from .run import check_inputs, load_prompts
from .scoring import open_scorer


@dataclass(frozen=True)
class DataCheck:
    """All training rows and demonstrations of a recipe, whatever its algorithm trains."""

    admission: Admission
    data: Any
    graded: bool
    """The recipe has a reward."""
    objections: tuple[str, ...]
    """Why a run would not start."""

    @property
    def ok(self) -> bool:
        return not self.objections

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "objections": list(self.objections),
            "data": asdict(self.data.report),
            "admission": asdict(self.admission.report),
            "findings": finding_rows(self.admission),
        }

    def show(self) -> None:
        console = wide_console()
        report = self.admission.report
        console.print(str(self.data.report), markup=False)
        console.print(source_table(report))
        if not self.graded:
            console.print("the recipe has no reward: no demonstration was graded")
        if report.findings:
            console.print(finding_table(report))
        console.print("\n".join(verdict_lines(report)), markup=False)
        if self.objections:
            refused = ["REFUSED: a run would not start", *self.objections]
            console.print("\n".join(refused), markup=False)


def check_data(recipe: Recipe, output: Path | None = None) -> DataCheck:
    """Examine and grade everything; `output` gets what the policy drops or refuses, with reasons.

    Raises ConfigError or DataError as the start of a run would, but not where the policy refuses.
    """
    inputs = check_inputs(recipe)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        scorer = stack.enter_context(open_scorer(recipe)) if recipe.reward else None
        data = load_prompts(inputs, resolve_model(recipe.model.path), output)
        admission = examine(recipe, inputs.algorithm, data, scorer)
    if output is not None:
        append(output, quarantined(admission, data))
    against = objections(admission, recipe.data.admission, None if output is None else str(output))
    return DataCheck(admission, data, recipe.reward is not None, tuple(against))


def source_table(report: AdmissionReport) -> Any:
    from rich.table import Table

    table = Table("source", title="Demonstrations by source", title_justify="left")
    names = ("rows", "demos", "right", "wrong", "unknown", "not graded", "right %")
    for name in (*names, "tokens 50 %", "95 %", "max"):
        table.add_column(name, justify="right")
    for s in report.sources:
        share = "" if s.share_right is None else f"{100 * s.share_right:.1f}"
        counts = (s.rows, s.demonstrations, s.right, s.wrong, s.unknown, s.not_graded)
        lengths = (s.length_median, s.length_95, s.length_max)
        table.add_row(
            s.source, *map(str, counts), share, *("" if n is None else f"{n:.0f}" for n in lengths)
        )
    return table


def finding_table(report: AdmissionReport) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        "reason", "found", "policy", "for example", title="Findings", title_justify="left"
    )
    for reason, count in report.findings.items():
        examples = "\n".join(report.examples[reason])
        table.add_row(reason, str(count), report.actions[reason], escape(examples))
    return table


def verdict_lines(report: AdmissionReport) -> list[str]:
    dropped = ", ".join(f"{n} {reason}" for reason, n in report.dropped.items())
    lines = [
        f"{report.demonstrations} demonstrations: {report.admitted} admitted"
        + (f", {sum(report.dropped.values())} dropped ({dropped})" if dropped else "")
    ]
    if report.left_out:
        counts = ", ".join(f"{n} {reason}" for reason, n in report.left_out.items())
        lines.append(f"{sum(report.left_out.values())} rows leave the training set ({counts})")
    return lines
