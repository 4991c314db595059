"""The pool of rollout workers: keeps them busy sample by sample and streams finished samples out, whoever dies.

What a lost worker owed is asked for again, at once and from another one; what it may still answer is not heard. A
worker that took its place gets samples only after a proved weight sync. Who is lost, and who replaces it: crew.py.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ..engine.errors import RolloutError, Stalled, VersionGone, WorkerLost
from ..engine.types import Rollout, RolloutRequest
from .config import RolloutConfig
from .crew import TICK, Crew, Loss, Member, explain
from .engine_process import environment
from .worker import Begun, RolloutWorker, SampleTask, WorkerProof, sample_seed

_CANCEL_SECONDS = 30.0
_SIBLINGS = 8
"""Samples that a worker may have more than another one, so that those of a prompt share its cache."""


@dataclass(frozen=True, slots=True)
class _Owed:
    """A sample that was handed to a worker and has not come back."""

    task: SampleTask
    member: Member
    since: float


class Pool:
    """contracts.RolloutPool over Ray actors of this cluster; ray.init() is the caller's business.

    >>> with_pool = Pool("models/tiny", RolloutConfig(), dtype="float32", seed=0)      # doctest: +SKIP
    >>> [rollout.text for rollout in with_pool.generate(requests, step=0)]             # doctest: +SKIP
    """

    def __init__(
        self,
        model_path: str,
        config: RolloutConfig,
        *,
        dtype: str,
        seed: int,
        version: int = 0,
        seats: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """All workers start in parallel, in the background; `wait_started` tells when they are up.

        `dtype` is the rollouts' own or the learner's; `version` that of the weights in `model_path`. `seats` are Ray
        options for each worker's actor: where it lives. Without them Ray chooses.
        """
        self._config = config
        self.seed = seed
        """Of the run that samples; a pool may serve several, one after the other."""
        actor, options = ray.remote(RolloutWorker), _actor_options(config)

        def recruit(name: str, seat: int) -> Any:
            placed = actor.options(**options, **(seats[seat] if seats else {}))
            return placed.remote(name, model_path, config, dtype, version)

        self._crew = Crew(recruit, config)
        self._deadline = time.monotonic() + config.start_timeout_seconds
        self._stop_token_ids: tuple[int, ...] = ()
        self._version: int | None = None
        """What a worker must be proved to serve; None: no weights were sent yet."""
        self._sync: Callable[[Sequence[Any]], object] | None = None
        self._queue: deque[SampleTask] = deque()
        """Samples that no worker was handed yet."""
        self._owed: dict[Any, _Owed] = {}
        self._homes: dict[str, Member] = {}
        """Where the samples of a prompt went last, in this round."""
        self.reissued = 0
        """Samples that were asked for again."""

    @property
    def losses(self) -> Sequence[Loss]:
        """Workers lost so far."""
        return self._crew.losses

    def tell_by(self, tell: Callable[[str], None]) -> None:
        """`tell` gets one line about each worker that is lost, and each that takes its place."""
        self._crew.tell = tell

    def wait_started(self, stop_token_ids: Sequence[int] = ()) -> None:
        """Block until every worker serves. RolloutError names the one that failed or missed the deadline.

        `stop_token_ids` end a response beside the model's own end-of-sequence tokens.
        """
        self._stop_token_ids = tuple(stop_token_ids)
        if self._crew.begun:
            return
        while late := [member for member in self._crew.everyone() if not member.is_up]:
            if self._crew.failure is not None:
                break
            if time.monotonic() > self._deadline:
                names = ", ".join(member.name for member in late)
                self.close()
                raise RolloutError(
                    f"{names} did not finish start before its deadline "
                    f"(rollouts.start_timeout_seconds = {self._config.start_timeout_seconds:g})"
                )
            time.sleep(TICK / 2)
        if self._crew.failure is not None:
            self.close()
            raise self._crew.failure
        self._crew.begin()

    def generate(
        self, requests: Sequence[RolloutRequest], *, step: int
    ) -> Generator[Rollout, None, None]:
        """See contracts.RolloutPool; what a lost worker owed is drawn by another one.

        Raises RolloutError that names the prompt when a sample cannot be drawn or has lost `max_reissues` workers,
        Stalled when no worker can be had in time. Leaving the iterator early aborts what is still in flight.
        """
        for request in requests:
            yield from (one for one in request.begun if one.finish_reason != "abort")
        queue = self._queue = deque(task for r in requests for task in self._tasks(r, step))
        issued: Counter[tuple[str, int]] = Counter()
        owed = self._owed = {}
        self._homes = {}
        try:
            while queue or owed:
                self._welcomed()
                self._dispatch(queue, owed)
                if not owed:
                    self._wait_for_worker(self._welcomed)
                    continue
                for ref in finished(list(owed)):
                    rollout = self._collect(ref, owed) if ref in owed else None  # interrupted
                    if rollout is not None:
                        yield rollout
                self._lose_overdue(owed)
                self._take_back(queue, owed, issued)
        finally:
            self._abandon(owed)

    def interrupt(self) -> list[Rollout]:
        """See contracts.RolloutPool. A worker that does not end its samples in time is lost, and they with it."""
        begun = [rollout for task in self._queue for rollout in so_far(task)]
        self._queue.clear()
        for member in {one.member for one in self._owed.values() if not one.member.lost}:
            member.actor.interrupt.remote()
        deadline = time.monotonic() + _CANCEL_SECONDS
        while self._owed:
            for ref in finished(list(self._owed)):
                if (rollout := self._collect(ref, self._owed)) is not None:
                    begun.append(rollout)
            for ref in [ref for ref, one in self._owed.items() if one.member.lost]:
                begun += so_far(self._owed.pop(ref).task)
            if time.monotonic() > deadline:
                for member in {one.member for one in self._owed.values()}:
                    late = f"{member.name} does not end its samples"
                    self._crew.lose(member, late, silent=True)
        return [rollout for rollout in begun if rollout.logprobs]

    def receivers(self) -> Sequence[Any]:
        """Handles of the workers that are up; waits while there is none, Stalled at the deadline."""
        self._wait_for_worker(self._crew.up)
        return [member.actor for member in self._crew.up()]

    def prove(
        self, version: int, probes: Sequence[Sequence[int]], receivers: Sequence[Any]
    ) -> Sequence[WorkerProof]:
        """See contracts.RolloutPool; workers that are lost meanwhile are missing."""
        members = [member for member in self._crew.up() if member.actor in receivers]
        calls = {member.actor.prove.remote(version, probes): member for member in members}
        deadline = time.monotonic() + self._config.sync_timeout_seconds
        proofs = []
        for ref, member in calls.items():
            if not ray.wait([ref], timeout=max(0.0, deadline - time.monotonic()))[0]:
                late = f"{member.name} did not finish prove before its deadline"
                self._crew.lose(member, late, silent=True)
                continue
            proof = self._result(ref, member, "prove")
            if proof is not None:
                proofs.append(proof)
        return proofs

    def admit(
        self, version: int, receivers: Sequence[Any], sync: Callable[[Sequence[Any]], object]
    ) -> None:
        """See contracts.RolloutPool."""
        self._version, self._sync = version, sync
        for member in self._crew.everyone():
            if member.actor in receivers:
                member.version = version

    def status(self) -> list[dict[str, Any]]:
        """What each worker does, for status.json."""
        now = time.monotonic()
        oldest: dict[str, _Owed] = {}
        for one in list(self._owed.values()):
            if one.member.name not in oldest or one.since < oldest[one.member.name].since:
                oldest[one.member.name] = one
        rows = []
        for member in self._crew.everyone():
            row = {
                "name": member.name,
                "state": member.state,
                "seconds": round(member.seconds, 1),
                "version": member.version,
                "finished": member.finished,
                "owes": member.outstanding,
            }
            if member.name in oldest:
                first = oldest[member.name]
                row |= {"oldest": str(first.task), "oldest_seconds": round(now - first.since, 1)}
            rows.append(row)
        return rows

    def close(self) -> None:
        """Kill the workers; their vLLM processes go with them. Does not wait for that."""
        self._crew.close()

    def _serving(self) -> list[Member]:
        return [member for member in self._crew.up() if member.version == self._version]

    def _welcomed(self) -> list[Member]:
        """Those that may be given samples, after bringing workers that came up late to the present weights."""
        late = [member.actor for member in self._crew.up() if member.version != self._version]
        if late and self._sync is not None:
            try:
                self._sync(late)
            except WorkerLost:
                pass  # the crew replaces them
            except VersionGone:  # they wait for the next weights
                if not self._serving():
                    raise
        return self._serving()

    def _dispatch(self, queue: deque[SampleTask], owed: dict[Any, _Owed]) -> None:
        """Hand samples to a worker that knows the prompt already, else to the least loaded one, while one has room.

        No worker is given more than twice what it decodes at once: enough that it never idles, and late samples still
        go where there is room. What is finished and not yet taken counts, so a slow consumer slows the workers down.
        """
        while queue and (serving := self._serving()):
            least = min(serving, key=lambda one: one.outstanding)
            limit = 2 * self._config.max_num_seqs
            if least.outstanding >= limit:
                return
            member = self._homes.get(queue[0].prompt_id, least)
            ahead = member.outstanding - least.outstanding
            if member not in serving or member.outstanding >= limit or ahead >= _SIBLINGS:
                member = least
            self._homes[queue[0].prompt_id] = member
            task, now = queue.popleft(), time.monotonic()
            if not member.outstanding:
                member.last_sample = now
            owed[member.actor.generate.remote(task)] = _Owed(task, member, now)
            member.outstanding += 1

    def _collect(self, ref: Any, owed: dict[Any, _Owed]) -> Rollout | None:
        """The finished sample; None when its worker was lost: `_take_back` then asks again."""
        one = owed[ref]
        if one.member.lost:
            return None
        # It stays owed until its result is here: when it failed, its worker is drained with the others.
        rollout = self._result(ref, one.member, str(one.task))
        if rollout is None:
            return None
        if self._version is not None and rollout.policy_version != self._version:
            raise RolloutError(
                f"{one.task} was drawn by version {rollout.policy_version} at {one.member.name}, not "
                f"by {self._version}"
            )
        if one.task.begun is not None:
            rollout = replace(rollout, policy_version=one.task.begun.policy_version)
        del owed[ref]
        one.member.outstanding -= 1
        one.member.finished += 1
        one.member.last_sample = time.monotonic()
        return rollout

    def _result(self, ref: Any, member: Member, what: str) -> Any:
        """The value of a finished call; None when the worker is lost. RolloutError when the call itself is at fault."""
        try:
            return ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, WorkerLost):
                self._crew.lose(member, explain(member.name, error))
                return None
            if isinstance(error.cause, RolloutError):
                raise error.cause from None
            cause = error.cause or error
            raise RolloutError(f"rollout worker {member.name} failed at {what}: {cause}") from error
        except RayError as error:
            self._crew.lose(member, explain(member.name, error))
            return None

    def _lose_overdue(self, owed: Mapping[Any, _Owed]) -> None:
        limit, now = self._config.sample_timeout_seconds, time.monotonic()
        for member in {one.member for one in owed.values()}:
            if not member.lost and now - member.last_sample > limit:
                mine = {ref: one for ref, one in owed.items() if one.member is member}
                if ray.wait(list(mine), timeout=0)[0]:
                    continue  # finished, and not taken yet: the consumer is slow
                oldest = min(mine.values(), key=lambda one: one.since)
                reason = (
                    f"{member.name} finished no sample within rollouts.sample_timeout_seconds = {limit:g}; "
                    f"it owes {member.outstanding}, the oldest is {oldest.task}, for {now - oldest.since:.1f} s"
                )
                self._crew.lose(member, reason, silent=True)

    def _take_back(
        self, queue: deque[SampleTask], owed: dict[Any, _Owed], issued: Counter[tuple[str, int]]
    ) -> None:
        """Queue again, first of all, what lost workers owe; no answer of theirs is read from now on."""
        for ref in [ref for ref, one in owed.items() if one.member.lost]:
            one = owed.pop(ref)
            key = one.task.prompt_id, one.task.index
            issued[key] += 1
            if issued[key] > self._config.max_reissues:
                kind = Stalled if one.member.silent else RolloutError
                raise kind(
                    f"{one.task} lost its worker {issued[key]} times (rollouts.max_reissues = "
                    f"{self._config.max_reissues}); the last: rollout worker {one.member.lost}"
                )
            self.reissued += 1
            queue.appendleft(one.task)

    def _wait_for_worker(self, ready: Callable[[], Sequence[Member]]) -> None:
        """Until there is one; raises when none can come, Stalled at the deadline."""
        limit = self._config.start_timeout_seconds
        deadline = time.monotonic() + limit
        while not ready():
            if self._crew.failure is not None:
                raise self._crew.failure
            if time.monotonic() > deadline:
                doing = "; ".join(map(str, self._crew.everyone()))
                raise Stalled(
                    f"no rollout worker serves for rollouts.start_timeout_seconds = {limit:g}: {doing}"
                )
            time.sleep(TICK)

    def _abandon(self, owed: dict[Any, _Owed]) -> None:
        """Abort what is in flight and wait until the workers have dropped it: a weight sync may follow."""
        for ref, one in owed.items():
            one.member.outstanding -= 1
            ray.cancel(ref)
        deadline = time.monotonic() + _CANCEL_SECONDS
        while pending := {ref: one for ref, one in owed.items() if not one.member.lost}:
            _, late = ray.wait(list(pending), num_returns=len(pending), timeout=TICK)
            if not late:
                break
            if time.monotonic() > deadline:
                for ref in late:
                    member = owed[ref].member
                    self._crew.lose(member, f"{member.name} does not drop its samples", silent=True)
        owed.clear()

    def _tasks(self, request: RolloutRequest, step: int) -> Iterator[SampleTask]:
        prompt = request.prompt
        known = {one.index: one for one in request.begun}
        for index in range(request.first_index, request.first_index + request.n):
            one = known.get(index)
            if one is not None and one.finish_reason != "abort":
                continue
            yield SampleTask(
                prompt_id=prompt.prompt_id,
                index=index,
                prompt=prompt.token_ids,
                prefix=request.prefix,
                sampling=request.sampling,
                seed=sample_seed(self.seed, step, prompt.prompt_id, index),
                stop_token_ids=self._stop_token_ids,
                begun=None if one is None else begun_part(one),
            )


def begun_part(rollout: Rollout) -> Begun:
    generated = rollout.token_ids[rollout.prefix_len :]
    return Begun(generated, rollout.logprobs, rollout.policy_version)


def so_far(task: SampleTask) -> list[Rollout]:
    """What is there of a sample that nobody draws on; nothing where it was not begun."""
    begun = task.begun
    if begun is None:
        return []
    tokens, length = (*task.prefix, *begun.token_ids), len(task.prefix)
    version = begun.policy_version
    return [
        Rollout(task.prompt_id, task.index, tokens, length, begun.logprobs, version, "abort", "")
    ]


def finished(refs: Sequence[Any]) -> Sequence[Any]:
    """All that are, after waiting a little for the first one: one look at so many costs as much as the next."""
    first, _ = ray.wait(refs, timeout=TICK)
    return ray.wait(refs, num_returns=len(refs), timeout=0)[0] if first else ()


def _actor_options(config: RolloutConfig) -> dict[str, Any]:
    """Resources of one worker's process.

    No CPUs are claimed: on one small machine learner and rollouts work in turn, so threads are set, not reserved.
    """
    return {
        "num_cpus": 0,
        "num_gpus": config.tensor_parallel_size * config.gpu_share
        if config.device == "cuda"
        else 0,
        "max_concurrency": 2 * config.max_num_seqs + 8,
        "runtime_env": {"env_vars": environment(config)},
    }
