"""Admission of demonstrations: at the start of every run, and all of them for `plait check data`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from ..algorithms import AlgorithmBase
from ..algorithms.stages import Stages
from ..engine.errors import DataError
from ..engine.types import Score
from ..rollouts.admission import Examination
from ..rollouts.admission_policy import (
    Action,
    AdmissionConfig,
    Decision,
    Reason,
    choose_actions,
    decide,
)
from ..rollouts.admission_report import AdmissionReport, make_report
from ..rollouts.order import Permutation, derive_key
from ..rollouts.quarantine import Quarantined, append

if TYPE_CHECKING:
    from ..rewards.scorer import ProcessScorer
    from .config import Recipe

ADMISSION_FILE, QUARANTINE_FILE = "admission.json", "quarantine.jsonl"
SHOWN = 5
PROMPTS_TOGETHER = 512
"""Prompts that are given to the scoring processes at once."""


@dataclass(frozen=True)
class Admission:
    """What was found, and what follows from it."""

    examination: Examination
    actions: Mapping[Reason, Action]
    decision: Decision

    @property
    def report(self) -> AdmissionReport:
        return make_report(self.examination, self.decision, self.actions)


@dataclass(frozen=True)
class Settled:
    """An admission in the run folder: a resumed run trains the same demonstrations and grades none again."""

    report: AdmissionReport
    dropped: tuple[tuple[str, int], ...]
    left_out: dict[str, str]
    scores: tuple[tuple[str, int, Score], ...]


ADAPTER = TypeAdapter(Settled)


def admit(
    recipe: Recipe, algorithm: AlgorithmBase, data: Any, scorer: ProcessScorer | None, folder: Path
) -> AdmissionReport:
    """Leave out of `data` what the policy drops, and store the verifier's scores in it.

    What was dropped goes to quarantine.jsonl, the decision to admission.json; where that is there already, it stands.
    Raises DataError where the policy refuses the data, or nothing is left that the algorithm could train.
    """
    path = folder / ADMISSION_FILE
    demonstrated = trains_demonstrations(algorithm)
    if path.exists():
        settled = read_settled(path)
        if settled.report.rows != data.num_prompts:
            raise DataError(
                f"{path} was made for other data, of {settled.report.rows} training rows, and now there are "
                f"{data.num_prompts}; restore the data, or start a new run"
            )
    else:
        admission = examine(
            recipe,
            algorithm,
            data,
            scorer if demonstrated else None,
            max_graded=recipe.data.admission.max_graded,
            demonstrations=demonstrated,
        )
        append(folder / QUARANTINE_FILE, quarantined(admission, data))
        problems = objections(admission, recipe.data.admission, str(folder / QUARANTINE_FILE))
        if problems:
            raise DataError("\n".join([*problems, *admission.report.lines()]))
        settled = settle(admission)
        partial = path.with_suffix(".partial")
        partial.write_bytes(ADAPTER.dump_json(settled, indent=1))
        partial.rename(path)
    scores = {(name, place): score for name, place, score in settled.scores}
    data.admit(frozenset(settled.dropped), settled.left_out, scores)
    if demonstrated and not data.num_experts:
        raise DataError(
            f"algorithm.type = {algorithm.config.type!r} trains demonstrations, and none was admitted:\n"
            + "\n".join(settled.report.lines())
            + "\nrepair the data, or keep what is sound after all: data.admission.REASON = keep"
        )
    return settled.report


def examine(
    recipe: Recipe,
    algorithm: AlgorithmBase,
    data: Any,
    scorer: ProcessScorer | None,
    *,
    max_graded: int | None = None,
    demonstrations: bool = True,
) -> Admission:
    """Look at every training row; `scorer` grades at most `max_graded` demonstrations (None: all)."""
    limit = recipe.rollouts.max_response_length
    found = Examination(data.eval_prompts, limit, demonstrations=demonstrations)
    for row in data.rows():
        found.add(row)
    found.finish()
    if scorer is not None:
        chosen = choose_prompts(found.ungraded, max_graded, recipe.data.seed)
        for start in range(0, len(chosen), PROMPTS_TOGETHER):
            rows = [data.row(name) for name in chosen[start : start + PROMPTS_TOGETHER]]
            for row, graded in zip(rows, scorer.grade([r.prompt for r in rows]), strict=True):
                found.judge(row, graded)
    no_verifier = recipe.reward is not None and recipe.reward.gold_samples == 0
    keep_wrong = no_verifier or trains_wrong(algorithm)
    actions = choose_actions(recipe.data.admission, keep_wrong=keep_wrong)
    every = algorithm.every_prompt_demonstrated
    decision = decide(found.findings, found.places, actions, every_prompt_demonstrated=every)
    return Admission(found, actions, decision)


def choose_prompts(ungraded: Mapping[str, int], limit: int | None, seed: int) -> list[str]:
    """Prompts whose demonstrations are graded: all, or a draw with at most `limit` demonstrations together."""
    names = list(ungraded)
    if limit is None or not names:
        return names
    shuffle, chosen, total = Permutation(len(names), derive_key(seed, "admission")), [], 0
    for i in range(len(names)):
        name = names[shuffle(i)]
        if total + ungraded[name] > limit:
            break
        total += ungraded[name]
        chosen.append(name)
    return chosen


def trains_demonstrations(algorithm: AlgorithmBase) -> bool:
    return any("demonstrations" in needs for needs in algorithm.needs.values())


def trains_wrong(algorithm: AlgorithmBase) -> bool:
    """An expert loss that reads the rewards of demonstrations learns from wrong ones too."""
    if isinstance(algorithm, Stages):
        return any(map(trains_wrong, algorithm.members))
    loss = algorithm.expert_loss
    return loss is not None and "demonstration_scores" in loss.needs


def objections(admission: Admission, config: AdmissionConfig, file: str | None) -> list[str]:
    """Why a run may not start with this data; `file` holds the rows."""
    listed = f"{file} lists them" if file else "`plait check data RECIPE --output FILE` lists them"
    found = []
    if refused := admission.decision.refused:
        reasons = sorted({finding.reason.value for finding in refused})
        keys = " and ".join(f"data.admission.{reason}" for reason in reasons)
        shown = [f"  {finding.reason.value}: {finding}" for finding in refused[:SHOWN]]
        more = [f"  ... and {len(refused) - SHOWN} more"] if len(refused) > SHOWN else []
        found += [
            f"{keys} = refuse, and {len(refused)} findings are of that kind:",
            *shown,
            *more,
            f"correct or remove these rows ({listed}), or set {keys} to drop or keep",
        ]
    for share, what in dropped_shares(admission):
        if share > config.max_dropped_fraction:
            found.append(
                f"{share:.0%} of the {what}, more than data.admission.max_dropped_fraction = "
                f"{config.max_dropped_fraction:g}: see whether verifier, templates and limits fit the data ({listed}), "
                "or raise it"
            )
    return found


def dropped_shares(admission: Admission) -> Iterator[tuple[float, str]]:
    report = admission.report
    if report.demonstrations:
        dropped = sum(report.dropped.values())
        yield dropped / report.demonstrations, "demonstrations are dropped"
    graded = report.right + report.wrong
    if graded and admission.actions[Reason.WRONG] == "drop":
        yield report.wrong / graded, f"{graded} graded demonstrations are wrong"


def quarantined(admission: Admission, data: Any) -> Iterator[Quarantined]:
    """Of each finding that drops or refuses something, the prompt and the demonstration."""
    for finding in admission.examination.findings:
        if admission.actions[finding.reason] != "keep":
            reason = f"{finding.reason.value}: {finding.detail}"
            yield describe(data, finding.prompt_id, finding.place, reason)
    for name, reason in admission.decision.left_out.items():
        if reason == Reason.UNDEMONSTRATED:
            detail = f"{reason.value}: none of its demonstrations was admitted"
            yield describe(data, name, None, detail)


def describe(data: Any, name: str, place: int | None, reason: str) -> Quarantined:
    row = data.row(name)
    content = {"messages": list(row.prompt.messages), "answer": row.prompt.answer}
    if place is not None:
        texts = {**{i: d.text for i, d in row.items()}, **row.refused}
        content["demonstration"] = texts[place]
    where = "row" if place is None else f"demonstration {place}"
    return Quarantined(source=row.source, where=where, prompt_id=name, reason=reason, row=content)


def settle(admission: Admission) -> Settled:
    decision = admission.decision
    return Settled(
        report=admission.report,
        dropped=tuple(decision.dropped),
        left_out={name: f"admission: {reason.value}" for name, reason in decision.left_out.items()},
        scores=tuple((*key, score) for key, score in admission.examination.scores.items()),
    )


def read_settled(path: Path) -> Settled:
    """Raises DataError where the file is none of ours."""
    try:
        return ADAPTER.validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{path}: not an admission: {error}") from error


def report_of(folder: Path) -> dict[str, Any]:
    """The admission's numbers, for summary.json."""
    return asdict(read_settled(folder / ADMISSION_FILE).report)


def finding_rows(admission: Admission) -> Sequence[dict[str, Any]]:
    """Every finding, for programs."""
    return [
        {**asdict(finding), "action": admission.actions[finding.reason]}
        for finding in admission.examination.findings
    ]
