"""The training loop, read in one go.

restore -> publish weights -> repeat { data -> plan -> rollout -> score -> assemble -> for each update: collate,
annotate, finish, update, observe -> publish weights -> log, evaluate, checkpoint }.

It knows no algorithm, no Ray and no vLLM: everything comes through the Protocols of contracts.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from .batch import collate
from .checkpoint import Checkpoints, Snapshot, snapshot, step_of
from .config import EvalConfig, LoopConfig
from .contracts import Algorithm, DataSource, Learners, RolloutPool, Scorer
from .durable import storage_errors
from .errors import LearnerLost, Stopped, WorkerLost
from .evaluation import EvalResult, evaluate_groups, evaluation_requests
from .failpoints import reach
from .journal import Journal
from .ledger import expert_ledger, gradient_ledger, split_by_source
from .metrics import RunLog, step_metrics
from .probes import GradientProbe
from .recovery import Recovery
from .run_state import RunState
from .saved_batch import SavedBatch, save_rounds, to_bytes
from .step_record import StepRecord, account, count_outcomes
from .step_rollouts import (
    Planned,
    Round,
    plan_step,
    rollout_rounds,
    sample_ahead,
    waiting_metrics,
)
from .stop import StopAsked, StopRequest
from .sync_proof import SyncProof, Tolerance, digest, prove_sync
from .types import RolloutGroup, Sampling, TrainBatch, Update, UpdateReport

LOGGING = "the log of the run cannot be written"


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of, composed by `launch`."""

    algorithm: Algorithm
    data: DataSource
    rollouts: RolloutPool
    scorer: Scorer
    learners: Learners
    checkpoints: Checkpoints
    log: RunLog
    probes: Sequence[Sequence[int]]
    """Token sequences whose log-probs prove each weight sync."""
    tolerance: Tolerance
    """How closely learner and sampler must agree on them."""
    journal: Journal | None = None
    """None: what was sampled is lost with the process."""
    stop: StopRequest = field(default_factory=StopRequest)
    """Asked by signal handlers."""
    beside: Executor = field(default_factory=partial(ThreadPoolExecutor, 1, "plait-learner"))
    """One thread, in which the learner works while this one has the samplers work."""


def train(config: LoopConfig, evaluation: EvalConfig, sampling: Sampling, parts: Parts) -> RunState:
    """Run to the end that `config` sets, from the last checkpoint where there is one.

    A learner that is lost starts again, and the run goes on as a resumed one would: from the last checkpoint, with the
    rollouts of the journal.
    """
    recovery = Recovery.of(config.max_restarts, parts)
    state: RunState | None = None
    while True:
        try:
            state, planned = begin(config, evaluation, sampling, parts, state), None
            while planned or end_reason(config, state) is None:
                planned = go_on(config, evaluation, sampling, parts, state, planned)
                recovery.step_done()
            return state
        except LearnerLost as lost:
            recovery.restart(parts, state, lost)


def begin(
    config: LoopConfig,
    evaluation: EvalConfig,
    sampling: Sampling,
    parts: Parts,
    before: RunState | None,
) -> RunState:
    """Everything as the last checkpoint has it; `before`: where a lost learner had come to."""
    state = parts.checkpoints.restore(parts.algorithm, parts.data, parts.learners)
    if before is not None:
        state.eval_before = before.eval_before
    with storage_errors(parts.log.folder, LOGGING):
        parts.log.begin(state, config.steps)
    publish(parts, state)
    if state.eval_before is None and state.step == 0 and parts.data.eval_prompts:
        try:
            state.eval_before = evaluate(parts, evaluation, sampling, state)
        except StopAsked as asked:
            raise Stopped(f"{asked} before the first step; nothing is lost") from None
    return state


def go_on(
    config: LoopConfig,
    evaluation: EvalConfig,
    sampling: Sampling,
    parts: Parts,
    state: RunState,
    planned: Planned | None = None,
) -> Planned | None:
    """One step, and what is due after it; `planned`: where it was begun ahead. Returns the next one where that is."""
    started = time.perf_counter()
    before = None if planned else snapshot(state, parts.algorithm, parts.data)
    ahead = begins_next(config, evaluation, parts, state)
    try:
        done = take_step(config, sampling, parts, state, planned, ahead=ahead)
    except StopAsked:  # while it sampled: the weights are still those of `before`
        stop_at(None if ahead else before, parts, state)
    state.count_generated(done.groups)
    if state.advance(done.reports):  # samplers follow the learner
        publish(parts, state)
    state.step_seconds += time.perf_counter() - started
    record_step(config, parts, state, done)

    last = done.next is None and end_reason(config, state) is not None
    best = False
    if parts.data.eval_prompts and (last or due(state.step, evaluation.every)):
        best = state.note_evaluation(evaluate(parts, evaluation, sampling, state))
    if last or best or due(state.step, parts.checkpoints.every):
        with parts.log.phase("checkpoint"):
            parts.checkpoints.save(state, parts.algorithm, parts.data, parts.learners)
    settle(parts, wait=last)
    if parts.stop.reason and not last:
        here = None if done.next else snapshot(state, parts.algorithm, parts.data)
        stop_at(here, parts, state)
    return done.next


def begins_next(config: LoopConfig, evaluation: EvalConfig, parts: Parts, state: RunState) -> bool:
    """Whether the step after this one is sampled while this one trains.

    Not where something is due between them: an evaluation needs the samplers, and a checkpoint holds no half steps, so
    that a resumed run repeats every bit.
    """
    step = state.step + 1
    between = step >= config.steps or due(step, parts.checkpoints.every)
    between |= bool(parts.data.eval_prompts) and due(step, evaluation.every)
    return config.staleness > 0 and not between and end_reason(config, state) is None


def stop_at(here: Snapshot | None, parts: Parts, state: RunState) -> NoReturn:
    """Have a checkpoint of this moment, and end the run. Raises Stopped.

    None: in the midst of two steps. What was sampled is in the journal, from which the same steps are taken again.
    """
    settle(parts, wait=True)
    saved = parts.checkpoints.complete()
    if here is not None and (not saved or step_of(saved[-1]) != here.step):
        with parts.log.phase("checkpoint"):
            parts.checkpoints.write(here, parts.learners)
        settle(parts, wait=True)
    kept = (
        "its last checkpoint and its journal"
        if here is None
        else f"checkpoints/step-{here.step:06d}"
    )
    step = state.step if here is None else here.step
    raise Stopped(
        f"{parts.stop.reason} after {step} steps, all of them in {kept}; the run goes "
        f"on with `plait resume {parts.log.folder}`, or when its job is submitted again"
    )


def settle(parts: Parts, *, wait: bool = False) -> None:
    """Commit the checkpoint under way once it is written; raises CheckpointError where it could not be."""
    if not parts.checkpoints.pending:
        return
    with parts.log.phase("checkpoint"):
        committed = parts.checkpoints.settle(wait=wait)
    if committed is not None and parts.journal is not None:
        parts.journal.prune(parts.checkpoints.complete())


@dataclass(frozen=True)
class StepDone:
    """What one step was made of, and what came of it."""

    planned: Planned
    rounds: Sequence[Round]
    updates: Sequence[Update]
    reports: Sequence[UpdateReport]
    ledger: dict[str, float]
    outcomes: tuple[tuple[str, str], ...]
    """Of every prompt drawn from the training stream; `expert_outcomes` of the expert stream."""
    expert_outcomes: tuple[tuple[str, str], ...]
    next: Planned | None
    """The step after it, sampled while this one trained."""

    def record(self, state: RunState) -> StepRecord:
        updates = ((r.loss_name, r.metrics.get("loss"), r.grad_norm) for r in self.reports)
        return StepRecord(
            state.step, self.outcomes, self.expert_outcomes, tuple(updates), state.weights
        )

    @property
    def groups(self) -> list[RolloutGroup]:
        """Of all rounds, in order."""
        return [group for _, groups in self.rounds for group in groups]


def take_step(
    config: LoopConfig,
    sampling: Sampling,
    parts: Parts,
    state: RunState,
    planned: Planned | None = None,
    *,
    ahead: bool = False,
) -> StepDone:
    """One step up to its last update; the samplers still serve the weights of before."""
    algorithm, data = parts.algorithm, parts.data
    step = state.step  # completed steps: what schedules and seeds depend on

    # 1. What to do: prompts, prefixes, demonstrations.
    planned = planned or plan_step(config, parts, state)
    draws, experts = planned.draws, planned.experts

    # 2. Experience in one or several rounds, scored while it streams in. A supervised step has none.
    first = first_rows(parts, planned, step)
    measures = due(step, config.gradient_every)
    with trained_beside(parts, None if measures else first):
        rounds = rollout_rounds(parts, planned, state)
    groups = [group for _, found in rounds for group in found]
    reach("step.journaled")
    settle(parts)  # it was written while the samplers worked
    data.observe(groups)

    # 3. Learning signal: rows with source, advantage and weight per token.
    updates = algorithm.assemble(planned.plan, groups, step)

    # 4. One or several optimizer phases: RL, SFT, or both.
    ledger = measure_gradients(parts, updates, step, by_source=measures)
    if measures and first is not None:
        begin_rows(parts, first)
    following = plan_step(config, parts, state, ahead=1) if ahead else None
    reports = train_on(parts, updates, step, following)
    reach("step.updated")
    ledger |= expert_ledger(algorithm, planned.asked, groups, updates, step, sampling.max_tokens)
    known = algorithm.ledger(updates, step)
    reasons = {**known.unused, **known.dropped}
    outcomes = account(draws.prompts, draws.repeated, groups, reports, reasons)
    expert_outcomes = account(experts, (), groups, reports, reasons)
    return StepDone(planned, rounds, updates, reports, ledger, outcomes, expert_outcomes, following)


def first_rows(parts: Parts, planned: Planned, step: int) -> Update | None:
    """Rows that no rollout changes, where one optimizer step takes the whole update."""
    first = parts.algorithm.first_rows(planned.plan, step)
    return None if first is None or first.minibatches * first.epochs > 1 else first


@contextmanager
def trained_beside(parts: Parts, first: Update | None) -> Iterator[None]:
    """Train the first rows while the samplers work; their gradient waits for that of the others."""
    if first is None:
        yield
        return
    begun = parts.beside.submit(begin_rows, parts, first)
    try:
        yield
    finally:
        with parts.log.phase("wait_for_update"):
            wait([begun])
    begun.result()


def begin_rows(parts: Parts, first: Update) -> None:
    started = time.perf_counter()
    parts.learners.begin(collate(first.samples), first)
    parts.log.took("first_rows", time.perf_counter() - started)


def train_on(
    parts: Parts, updates: Sequence[Update], step: int, following: Planned | None
) -> list[UpdateReport]:
    """Apply the updates in order; meanwhile the first round of the step after this one is sampled, where it is due."""
    if following is None or following.draws.journaled is not None or not following.plan.requests:
        with parts.log.phase("update"):
            return apply_updates(parts, updates, step)
    training = parts.beside.submit(update_beside, parts, updates, step)
    try:
        sample_ahead(parts, following, training)
    finally:
        with parts.log.phase("wait_for_update"):
            wait([training])
    return training.result()


def update_beside(parts: Parts, updates: Sequence[Update], step: int) -> list[UpdateReport]:
    started = time.perf_counter()
    reports = apply_updates(parts, updates, step)
    parts.log.took("update", time.perf_counter() - started)
    return reports


def apply_updates(parts: Parts, updates: Sequence[Update], step: int) -> list[UpdateReport]:
    return [report for update in updates for report in apply_update(parts, update, step)]


def record_step(config: LoopConfig, parts: Parts, state: RunState, done: StepDone) -> None:
    """Write what a person may want to know of the step."""
    algorithm, log = parts.algorithm, parts.log
    rounds = [groups for _, groups in done.rounds]
    metrics = step_metrics(state, rounds, done.updates, done.reports, algorithm.metrics())
    metrics |= done.ledger | count_outcomes(done.outcomes) | dict(parts.data.metrics())
    if config.extra_prompts:
        metrics |= waiting_metrics(done.planned, state)
    with storage_errors(log.folder, LOGGING):
        log.step(state, done.groups, metrics)
        log.record(done.record(state))
        if due(state.step, config.save_batch_every):
            path = log.folder / "batches" / f"step-{state.step:06d}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            batch = SavedBatch(state.step - 1, *save_rounds(done.planned.asked, done.rounds))
            path.write_bytes(to_bytes(path, batch))


def end_reason(config: LoopConfig, state: RunState) -> str | None:
    """The field of `loop` that ends the run here; None where it goes on."""
    if state.step >= config.steps:
        return "steps"
    if config.max_trained_tokens is not None and state.trained_tokens >= config.max_trained_tokens:
        return "max_trained_tokens"
    if config.max_seconds is not None and state.step_seconds >= config.max_seconds:
        return "max_seconds"
    return None


def measure_gradients(
    parts: Parts, updates: Sequence[Update], step: int, *, by_source: bool
) -> dict[str, float]:
    """Gradients at the present weights, none of them applied: what the algorithm asks for, and those of each source."""
    wanted = {name: (u, None) for name, u in parts.algorithm.probes(updates, step).items()}
    split = split_by_source(parts.algorithm, updates) if by_source else {}
    if not wanted and not split:
        return {}
    with parts.log.phase("gradients"):
        if updates and updates[0].refresh_reference:
            parts.learners.refresh_reference()
        ready: dict[tuple[int, str], TrainBatch] = {}  # probes of the same rows share a batch
        probes = []
        for name, (update, only) in {**wanted, **split}.items():
            rows = id(update.samples), update.loss
            batch = ready[rows] = ready.get(rows) or make_batch(parts, update)
            probes.append(GradientProbe(name, batch, update.loss, update.coefs, only))
        prepare = parts.algorithm.prepare
        found = parts.learners.compare_gradients(probes, step=step, prepare=prepare)
    if not found.is_finite:
        return {}  # the update itself will be left out, and counted
    if wanted:
        parts.algorithm.observe_gradients(found)
    return gradient_ledger(found, split)


def apply_update(parts: Parts, update: Update, step: int) -> list[UpdateReport]:
    """Collate, annotate, finish, train: one optimizer phase of minibatches x epochs steps."""
    if update.refresh_reference:
        parts.learners.refresh_reference()
    batch = make_batch(parts, update)
    hooks = {"prepare": parts.algorithm.prepare, "remember": parts.algorithm.remember}
    reports = list(parts.learners.update(batch, update, step=step, **hooks))
    for report in reports:
        if report.applied:
            parts.algorithm.observe(report)
    return reports


def make_batch(parts: Parts, update: Update) -> TrainBatch:
    """All rows of an update with the columns that its losses need."""
    single = update.minibatches * update.epochs == 1
    needs = parts.algorithm.needs[update.loss]
    if update.critic_loss is not None:
        needs |= parts.algorithm.needs[update.critic_loss]
    rows = collate(update.samples)
    batch = parts.learners.annotate(rows, needs, single=single, loss=update.loss)
    return parts.algorithm.finish(batch)


def publish(parts: Parts, state: RunState) -> None:
    """Send the learner's weights to every sampler and prove that they are what is served."""
    state.syncs += 1
    with parts.log.phase("sync"):
        proof = None
        while proof is None:
            # All may die meanwhile: the pool names those that take their place, or gives up.
            with suppress(WorkerLost):
                proof = sync(parts, state, parts.rollouts.receivers())
    state.syncs_proved += 1
    parts.log.synced(proof)


def sync(parts: Parts, state: RunState, receivers: Sequence[Any]) -> SyncProof:
    """Bring the receivers to the learner's weights, all of them or those that come up later, and let them serve."""
    version = state.policy_version
    parts.learners.connect(receivers)
    checksums = parts.learners.send_weights(version)
    state.weights = digest(checksums)
    proof = prove_sync(
        parts.learners,
        parts.rollouts,
        version=version,
        receivers=receivers,
        checksums=checksums,
        probes=parts.probes,
        tolerance=parts.tolerance,
    )
    parts.rollouts.admit(version, receivers, partial(sync, parts, state))
    return proof


def evaluate(parts: Parts, config: EvalConfig, sampling: Sampling, state: RunState) -> EvalResult:
    """Score the held-out prompts with the current policy.

    Raises StopAsked, but only before the first step: a resumed run would not make up for a later one.
    """
    requests = evaluation_requests(parts.data.eval_prompts, config, sampling.max_tokens)
    drawn = parts.rollouts.generate(requests, step=state.step)
    waits = parts.stop.breakable() if state.step == 0 else nullcontext()
    with parts.log.phase("eval"), waits, closing(drawn):
        groups = parts.scorer.score(requests, parts.log.watch(drawn, requests))
    result = evaluate_groups(groups)
    with storage_errors(parts.log.folder, LOGGING):
        parts.log.evaluated(state, groups, result)
    return result


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
