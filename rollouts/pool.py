"""The pool of rollout workers: starts them, keeps them busy sample by sample, and streams finished samples out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ..engine.errors import RolloutError
from ..engine.types import Rollout, RolloutRequest
from .config import RolloutConfig
from .engine_process import environment
from .worker import RolloutWorker, SampleTask, WorkerProof, sample_seed

_CANCEL_SECONDS = 30.0


@dataclass(slots=True)
class _Member:
    """One worker as the pool sees it."""

    name: str
    actor: Any
    outstanding: int = 0


@dataclass(frozen=True, slots=True)
class _Owed:
    """A sample that was handed to a worker and has not come back."""

    task: SampleTask
    member: _Member
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
        self._members = []
        for number in range(config.num_workers):
            placed = actor.options(**options, **(seats[number] if seats else {}))
            name = f"rollout-{number}"
            handle = placed.remote(name, model_path, config, dtype, version)
            self._members.append(_Member(name, handle))
        self._deadline = time.monotonic() + config.start_timeout_seconds
        self._starting = self._submit_all("start", ())
        self._stop_token_ids: tuple[int, ...] = ()

    def wait_started(self, stop_token_ids: Sequence[int] = ()) -> None:
        """Block until every worker serves. RolloutError names the one that failed or missed the deadline.

        `stop_token_ids` end a response beside the model's own end-of-sequence tokens.
        """
        self._stop_token_ids = tuple(stop_token_ids)
        try:
            self._gather(self._starting, "start", self._deadline)
        except RolloutError:
            self.close()
            raise

    def generate(
        self, requests: Sequence[RolloutRequest], *, step: int
    ) -> Generator[Rollout, None, None]:
        """Yield every requested rollout once, as it finishes.

        RolloutError when a worker fails or dies, or when no sample finishes for `sample_timeout_seconds`. Leaving the
        iterator early aborts what is still in flight.
        """
        queue = deque(task for request in requests for task in self._tasks(request, step))
        owed: dict[Any, _Owed] = {}
        try:
            while queue or owed:
                self._dispatch(queue, owed)
                ready, _ = ray.wait(list(owed), timeout=self._config.sample_timeout_seconds)
                if not ready:
                    raise self._overdue(owed)
                # It stays owed until its result is here: when it failed, its worker is drained with the others.
                rollout = _collect(ready[0], owed[ready[0]])
                owed.pop(ready[0]).member.outstanding -= 1
                yield rollout
        finally:
            _abandon(owed)

    def receivers(self) -> Sequence[Any]:
        return [member.actor for member in self._members]

    def prove(self, version: int, probes: Sequence[Sequence[int]]) -> Sequence[WorkerProof]:
        """See contracts.RolloutPool; RolloutError when a worker fails or misses the sync deadline."""
        return self._call_all("prove", (version, probes), self._config.sync_timeout_seconds)

    def close(self) -> None:
        """Kill the workers; their vLLM processes follow them at once. Never blocks."""
        for member in self._members:
            ray.kill(member.actor)
        self._members = []

    def _dispatch(self, queue: deque[SampleTask], owed: dict[Any, _Owed]) -> None:
        """Hand samples to the least loaded worker while one has room.

        No worker is given more than twice what it decodes at once: enough that it never idles, and late samples still
        go where there is room.
        """
        while queue:
            member = min(self._members, key=lambda one: one.outstanding)
            if member.outstanding >= 2 * self._config.max_num_seqs:
                return
            task = queue.popleft()
            owed[member.actor.generate.remote(task)] = _Owed(task, member, time.monotonic())
            member.outstanding += 1

    def _overdue(self, owed: Mapping[Any, _Owed]) -> RolloutError:
        oldest = min(owed.values(), key=lambda one: one.since)
        waited = time.monotonic() - oldest.since
        return RolloutError(
            f"no sample finished within rollouts.sample_timeout_seconds = {self._config.sample_timeout_seconds:g}; "
            f"{len(owed)} are outstanding, the oldest is prompt {oldest.task.prompt_id} (index {oldest.task.index}) "
            f"at rollout worker {oldest.member.name}, for {waited:.1f} s"
        )

    def _tasks(self, request: RolloutRequest, step: int) -> Iterator[SampleTask]:
        prompt = request.prompt
        for index in range(request.first_index, request.first_index + request.n):
            yield SampleTask(
                prompt_id=prompt.prompt_id,
                index=index,
                prompt=prompt.token_ids,
                prefix=request.prefix,
                sampling=request.sampling,
                seed=sample_seed(self.seed, step, prompt.prompt_id, index),
                stop_token_ids=self._stop_token_ids,
            )

    def _call_all(self, method: str, args: tuple[Any, ...], timeout: float) -> list[Any]:
        """One call to every worker at once; results in the workers' order. RolloutError names the failing worker."""
        return self._gather(self._submit_all(method, args), method, time.monotonic() + timeout)

    def _submit_all(self, method: str, args: tuple[Any, ...]) -> dict[Any, str]:
        return {getattr(one.actor, method).remote(*args): one.name for one in self._members}

    def _gather(self, calls: Mapping[Any, str], method: str, deadline: float) -> list[Any]:
        pending = list(calls)
        results: dict[Any, Any] = {}
        while pending:
            ready, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = ", ".join(calls[ref] for ref in pending)
                raise RolloutError(f"{late} did not finish {method} before its deadline")
            results[ready[0]] = _result(ready[0], calls[ready[0]], method)
        return [results[ref] for ref in calls]


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


def _collect(ref: Any, owed: _Owed) -> Rollout:
    return _result(ref, owed.member.name, f"prompt {owed.task.prompt_id} (index {owed.task.index})")


def _result(ref: Any, name: str, what: str) -> Any:
    """The value of a finished call, or RolloutError that names worker and work."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RolloutError):
            raise cause from None
        raise RolloutError(f"rollout worker {name} failed at {what}: {cause}") from error
    except RayActorError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise RolloutError(f"rollout worker {name} died; it owed {what}. {reason}") from error


def _abandon(owed: dict[Any, _Owed]) -> None:
    """Abort what is in flight and wait until the workers have dropped it: a weight sync may follow."""
    for ref, one in owed.items():
        one.member.outstanding -= 1
        try:
            ray.cancel(ref)
        except RayError:
            continue
    if owed:
        ray.wait(list(owed), num_returns=len(owed), timeout=_CANCEL_SECONDS)
        owed.clear()
