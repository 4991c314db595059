"""What became of every demonstration and training row at admission, in numbers; for people and for summary.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .admission import Examination, Source
from .admission_policy import Action, Decision, Reason

EXAMPLES = 3


@dataclass(frozen=True)
class SourceReport:
    """One source of the data; lengths in tokens, null where it has no demonstration."""

    source: str
    rows: int
    demonstrations: int
    right: int
    wrong: int
    unknown: int
    not_graded: int
    length_median: float | None
    length_95: float | None
    length_max: int | None

    @property
    def share_right(self) -> float | None:
        """Of the demonstrations with a verdict."""
        known = self.right + self.wrong
        return self.right / known if known else None


@dataclass(frozen=True)
class AdmissionReport:
    """`demonstrations == admitted + sum(dropped.values())`; also right + wrong + unknown + not_graded."""

    rows: int
    """Training rows that were looked at."""
    demonstrations: int
    admitted: int
    dropped: Mapping[str, int]
    """Demonstrations by the first reason to drop them, their row's included."""
    left_out: Mapping[str, int]
    """Training rows by reason."""
    findings: Mapping[str, int]
    """Faults by reason, those that are only counted included; a demonstration may have several."""
    actions: Mapping[str, Action]
    """What is done about each reason that was found."""
    examples: Mapping[str, Sequence[str]]
    right: int
    wrong: int
    unknown: int
    not_graded: int
    stored: int
    """Of the scores, those that came with the data."""
    sources: Sequence[SourceReport]

    def lines(self) -> list[str]:
        """A few, for the start of a run."""
        graded = f"{self.right} right, {self.wrong} wrong, {self.unknown} unknown, {self.not_graded} not graded"
        lines = [
            f"{self.demonstrations} demonstrations: {self.admitted} admitted; {graded}"
            if self.demonstrations
            else "no demonstration was looked at"
        ]
        for reason, count in self.findings.items():
            done = {"drop": "dropped", "keep": "kept", "refuse": "REFUSED"}[self.actions[reason]]
            lines.append(f"  {count} {reason}, {done}: {'; '.join(self.examples[reason])}")
        if self.left_out:
            counts = ", ".join(f"{n} {reason}" for reason, n in self.left_out.items())
            lines.append(f"  {sum(self.left_out.values())} rows leave the training set: {counts}")
        return lines


def make_report(
    examination: Examination, decision: Decision, actions: Mapping[Reason, Action]
) -> AdmissionReport:
    findings = Counter(finding.reason for finding in examination.findings)
    examples: dict[str, list[str]] = {}
    for finding in examination.findings:
        if len(shown := examples.setdefault(finding.reason, [])) < EXAMPLES:
            shown.append(str(finding))
    sources = [_describe(name, source) for name, source in examination.sources.items()]
    found = [reason for reason in Reason if findings[reason]]
    total = sum(s.demonstrations for s in sources)
    return AdmissionReport(
        rows=sum(s.rows for s in sources),
        demonstrations=total,
        admitted=total - len(decision.dropped),
        dropped=_count(decision.dropped.values()),
        left_out=_count(decision.left_out.values()),
        findings={reason.value: findings[reason] for reason in found},
        actions={reason.value: actions[reason] for reason in found},
        examples={reason.value: examples[reason] for reason in found},
        right=sum(s.right for s in sources),
        wrong=sum(s.wrong for s in sources),
        unknown=sum(s.unknown for s in sources),
        not_graded=sum(s.not_graded for s in sources),
        stored=sum(s.stored for s in examination.sources.values()),
        sources=sources,
    )


def _count(reasons: Iterable[Reason]) -> dict[str, int]:
    counts = Counter(reasons)
    return {reason.value: counts[reason] for reason in Reason if counts[reason]}


def _describe(name: str, source: Source) -> SourceReport:
    lengths = np.array(source.lengths)
    middle, high = np.quantile(lengths, (0.5, 0.95)).tolist() if len(lengths) else (None, None)
    return SourceReport(
        source=name,
        rows=source.rows,
        demonstrations=source.demonstrations,
        right=source.right,
        wrong=source.wrong,
        unknown=source.unknown,
        not_graded=source.not_graded,
        length_median=middle,
        length_95=high,
        length_max=int(lengths.max()) if len(lengths) else None,
    )
