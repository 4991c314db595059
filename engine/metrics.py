"""What a run says about itself: step metrics, evaluation results, and the files of the run folder.

Names are documented in docs/metrics.md. A number that does not exist is absent, never 0.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Protocol

from .durable import replace_durably
from .evaluation import SUCCESS, EvalResult, flat_result
from .failpoints import reach
from .step_record import STEPS_FILE, StepRecord
from .types import Prompt, Rollout, RolloutGroup, RolloutRequest, Source, Update, UpdateReport

if TYPE_CHECKING:
    from .run_state import RunState
    from .sync_proof import SyncProof


def step_metrics(
    state: RunState,
    rounds: Sequence[Sequence[RolloutGroup]],
    updates: Sequence[Update],
    reports: Sequence[UpdateReport],
    algorithm: Mapping[str, float],
) -> dict[str, float]:
    """All numbers of one step, by the names of docs/metrics.md; `rounds`: the groups of each round of rollouts."""
    samples = [sample for update in updates for sample in update.samples]
    metrics: dict[str, float] = {
        "policy_version": state.policy_version,
        "tokens/trained_so_far": state.trained_tokens,
        "time/steps_so_far": state.step_seconds,
        "rows/expert": sum(not (s.source == Source.POLICY).any() for s in samples),
        **{f"algorithm/{name}": value for name, value in algorithm.items()},
    }
    if rounds:
        groups = [group for round_ in rounds for group in round_]
        metrics |= {"rollouts/rounds": len(rounds), **rollout_metrics(groups)}
    versions = [s.policy_version for s in samples if s.policy_version is not None]
    if versions:
        # Rows were sampled before this step's update, under at most the version before the current one.
        metrics["staleness/max"] = (
            state.policy_version - bool(num_policy_steps(reports)) - min(versions)
        )
    metrics |= training_counts(updates)
    metrics |= report_metrics(reports)
    return metrics


def training_counts(updates: Sequence[Update]) -> dict[str, float]:
    """Rows with and without a trained token, and updates that therefore take no optimizer step."""
    trains = [[bool(s.weights[s.source > 0].any()) for s in update.samples] for update in updates]
    trained = sum(map(sum, trains))
    return {
        "rows/trained": trained,
        "rows/untrained": sum(map(len, trains)) - trained,
        "updates/untrained": sum(not any(rows) for rows in trains),
    }


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Numbers over all rollouts of a step; shares of groups count each prompt's first group, its own attempt."""
    first = {group.prompt.prompt_id: group for group in reversed(groups)}
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = [reward for group in groups for reward in group.rewards]
    metrics: dict[str, float] = {
        "rollouts/count": len(rollouts),
        "rollouts/length": fmean(len(r.token_ids) - r.prefix_len for r in rollouts),
        "rollouts/truncated": fmean(r.finish_reason == "length" for r in rollouts),
        "tokens/generated": sum(len(r.token_ids) - r.prefix_len for r in rollouts),
        "reward/unknown": len(rollouts) - len(rewards),
    }
    known = [sum(s.reward is not None for s in group.scores) for group in first.values()]
    sizes = [len(group.scores) for group in first.values()]
    metrics |= {
        "groups/unknown": known.count(0),
        "groups/partly_unknown": sum(0 < k < n for k, n in zip(known, sizes, strict=True)),
        "groups/single": known.count(1),
    }
    if rewards:
        metrics |= {"reward/mean": fmean(rewards), "reward/std": pstdev(rewards)}
    metrics |= part_metrics(first.values())
    if scored := [group.rewards for group in first.values() if group.rewards]:
        metrics |= {
            "groups/all_correct": fmean(min(r) >= SUCCESS for r in scored),
            "groups/all_wrong": fmean(max(r) < SUCCESS for r in scored),
            "groups/uniform": fmean(max(r) == min(r) for r in scored),
        }
    parts: dict[str, list[float]] = {}
    for group in groups:
        for score in group.scores:
            for name, value in score.parts.items():
                parts.setdefault(name, []).append(value)
    metrics |= {f"reward/part/{name}": fmean(values) for name, values in parts.items()}
    return metrics | demonstration_metrics([group.prompt for group in first.values()])


def part_metrics(groups: Iterable[RolloutGroup]) -> dict[str, float]:
    """Prompts and mean reward of each part of a data mixture; empty where the data is not mixed."""
    found: dict[str, float] = {}
    parts: dict[str, list[RolloutGroup]] = {}
    for group in groups:
        if group.prompt.part:
            parts.setdefault(group.prompt.part, []).append(group)
    for name, mine in sorted(parts.items()):
        found[f"mixture/prompts/{name}"] = len(mine)
        if rewards := [reward for group in mine for reward in group.rewards]:
            found[f"mixture/reward/{name}"] = fmean(rewards)
    return found


def demonstration_metrics(prompts: Sequence[Prompt]) -> dict[str, float]:
    """Counts of the demonstrations that the run's verifier graded; empty where none was."""
    scores = [d.score for prompt in prompts for d in prompt.demonstrations if d.score is not None]
    known = [score.reward for score in scores if score.reward is not None]
    if not scores:
        return {}
    return {
        "demonstrations/graded": len(known),
        "demonstrations/wrong": sum(reward < SUCCESS for reward in known),
        "demonstrations/unknown": len(scores) - len(known),
    }


def num_policy_steps(reports: Sequence[UpdateReport]) -> int:
    """Optimizer steps that moved the policy."""
    return sum(report.model == "policy" and report.applied for report in reports)


def report_metrics(reports: Sequence[UpdateReport]) -> dict[str, float]:
    """Tokens are sums over the step's optimizer steps; everything else is their mean, by loss.

    Steps that were left out are counted, and nothing else.
    """
    metrics: dict[str, float] = {"updates/skipped": sum(not report.applied for report in reports)}
    reports = [report for report in reports if report.applied]
    for source in sorted({source for report in reports for source in report.tokens}):
        metrics[f"tokens/{source}"] = sum(report.tokens.get(source, 0) for report in reports)
    for loss in dict.fromkeys(report.loss_name for report in reports):
        mine = [report for report in reports if report.loss_name == loss]
        values = [
            {**r.metrics, "grad_norm": r.grad_norm, "learning_rate": r.learning_rate} for r in mine
        ]
        metrics[f"{loss}/optimizer_steps"] = len(mine)
        for name in sorted({name for value in values for name in value}):
            metrics[f"{loss}/{name}"] = fmean(v[name] for v in values if name in v)
    return metrics


class Console(Protocol):
    """What a person watches; launch/console.py draws it."""

    def begin(self, step: int, steps: int) -> None: ...

    def phase(self, name: str) -> None: ...

    def progress(self, done: int, total: int) -> None: ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def say(self, message: str) -> None: ...

    def close(self) -> None: ...


@dataclass
class At:
    """Where the run is now; other threads read it."""

    phase: str = "start"
    step: int = 0
    since: float = field(default_factory=time.monotonic)
    samples: int = 0
    """Finished in this phase."""


class RunLog:
    """Writes metrics.jsonl, TensorBoard events and rollouts/*.jsonl of a run folder; keeps time by phase."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console
        self.seconds: dict[str, float] = {}
        self._step_seconds: dict[str, float] = {}
        self._step_started = time.perf_counter()
        self._sync: dict[str, float] = {}
        self._board: Any = None
        self.at = At()
        (folder / "rollouts").mkdir(parents=True, exist_ok=True)

    def begin(self, state: RunState, steps: int) -> None:
        """Continue after `state.step`: what an interrupted run wrote beyond it is removed."""
        from torch.utils.tensorboard.writer import SummaryWriter

        for name in ("metrics.jsonl", STEPS_FILE):
            path = self.folder / name
            if path.exists():
                lines = path.read_text().splitlines(keepends=True)
                # A run that begins anew evaluates the initial model anew, where it does not know the result.
                last = state.step if state.step or state.eval_before else -1
                kept = "".join(line for line in lines if line_step(line) <= last)
                replace_durably(path, kept)
        if self._board is not None:
            self._board.close()
        self._step_seconds = {}
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=state.step + 1)
        self.seconds = dict(state.seconds)
        self.console.begin(state.step, steps)
        self.at = At("begin", state.step + 1)
        self._step_started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the step and show that it is running."""
        self.console.phase(name)
        self.at = At(name, self.at.step)
        start = time.perf_counter()
        yield
        self.took(name, time.perf_counter() - start)
        self.at = At("between phases", self.at.step)

    def took(self, name: str, seconds: float) -> None:
        """Time of what ran beside the phases that are shown."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._step_seconds[name] = self._step_seconds.get(name, 0.0) + seconds

    def watch(
        self, rollouts: Iterable[Rollout], requests: Sequence[RolloutRequest]
    ) -> Iterator[Rollout]:
        """Pass rollouts through and count them for the console."""
        total = sum(request.n for request in requests)
        for done, rollout in enumerate(rollouts, start=1):
            self.at.samples = done
            self.console.progress(done, total)
            reach("rollout.received")
            yield rollout

    def step(
        self, state: RunState, groups: Sequence[RolloutGroup], metrics: Mapping[str, float]
    ) -> None:
        """Write one finished step. Its time runs from the end of the previous one, evaluation left out."""
        elapsed = time.perf_counter() - self._step_started
        times = {f"time/{name}": seconds for name, seconds in self._step_seconds.items()}
        row = {**metrics, **self._sync, **times, "time/step": elapsed}
        if groups:
            write_rollouts(self.folder / "rollouts" / f"step-{state.step:06d}.jsonl", groups)
        self._write(state.step, row)
        self.console.step(state.step, row)
        state.seconds = dict(self.seconds)
        self.at = At("between phases", state.step + 1)
        self._step_seconds = {}
        self._step_started = time.perf_counter()

    def record(self, record: StepRecord) -> None:
        with (self.folder / STEPS_FILE).open("a") as file:
            file.write(record.to_line())

    def evaluated(
        self, state: RunState, groups: Sequence[RolloutGroup], result: EvalResult
    ) -> None:
        write_rollouts(self.folder / "rollouts" / f"eval-{state.step:06d}.jsonl", groups)
        row = {f"eval/{name}": value for name, value in flat_result(asdict(result)).items()}
        self._write(state.step, row)
        self.console.say(
            f"eval after {state.step} steps: accuracy {result.accuracy:.3f} "
            f"[{result.low:.3f}, {result.high:.3f}] on {result.num_scored} scored, "
            f"{result.num_unknown} unknown"
        )
        for name, mine in result.sets.items():
            if "accuracy" in mine:
                self.console.say(
                    f"  {name}: accuracy {mine['accuracy']:.3f} [{mine['low']:.3f}, {mine['high']:.3f}] "
                    f"on {mine['num_scored']} scored, {mine['num_unknown']} unknown"
                )
            else:
                self.console.say(f"  {name}: all {mine['num_unknown']} scores unknown")
        state.seconds = dict(self.seconds)
        self._step_seconds.pop("eval", None)
        self._step_started = time.perf_counter()

    def synced(self, proof: SyncProof) -> None:
        """Keep what the proof of a weight sync measured for the step's metrics."""
        self._sync = {
            "sync/probe_max_difference": proof.max_difference,
            "sync/probe_mean_difference": proof.mean_difference,
        }
        if proof.version == 0:
            self.console.say(
                f"weights proved: {proof.parameters} parameters on {len(proof.workers)} rollout worker(s), "
                f"log-probs of {proof.probe_tokens} tokens differ by {proof.mean_difference:.2g} on average"
            )

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        self.console.close()

    def _write(self, step: int, row: Mapping[str, float]) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")
        for name, value in row.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()


def write_rollouts(path: Path, groups: Sequence[RolloutGroup]) -> None:
    """One JSON object a rollout: what was asked, said and scored."""
    with path.open("w") as file:
        for group in groups:
            for rollout, score in zip(group.rollouts, group.scores, strict=True):
                row = {
                    "prompt_id": rollout.prompt_id,
                    "index": rollout.index,
                    "policy_version": rollout.policy_version,
                    "finish_reason": rollout.finish_reason,
                    "prefix_len": rollout.prefix_len,
                    "length": len(rollout.token_ids),
                    "messages": [dict(m) for m in group.prompt.messages],
                    "answer": group.prompt.answer,
                    "text": rollout.text,
                    "status": score.status.value,
                    "reward": score.reward,
                    "shaping": score.shaping,
                    "parts": dict(score.parts),
                    "reason": score.reason,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def line_step(line: str) -> int:
    """Step of one metrics line; a line torn by a crash counts as beyond every step."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return 2**62
