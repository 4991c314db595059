"""Learner ranks as Ray actors: started together, watched while they work, killed and started again together.

A rank that died is noticed at once. One that is stopped answers no heartbeat. One that keeps the others waiting in a
collective is found by asking every rank for its stack: the late one is not inside a collective.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from .config import LearnerConfig
from .contracts import LossFn, Need
from .errors import ClusterError, LearnerError, LearnerLost, PlaitError
from .learner import LearnerWorker, Rank
from .processes import Place, all_gone, die_with_parent, family, how_it_died, kill_actor
from .rendezvous import free_port
from .types import TokenSampling

CLOSE_SECONDS = 5.0
_TICK = 0.5
_BEAT_SECONDS = 1.0
_SETTLE_SECONDS = 5.0
"""Ranks that lose a peer fail within milliseconds; Ray tells a little later who it was."""
_WATCH = "watch"
"""Ray's concurrency group for questions that are answered while the rank works."""
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
_FOLDER = str(Path(__file__).parent.parent)


@dataclass(frozen=True, slots=True)
class Activity:
    """What a rank does right now."""

    method: str
    """Of LearnerWorker; "" between calls."""
    seconds: float
    where: str
    """Innermost function, and the innermost line of plait that called it."""
    in_collective: bool
    calls: int
    """So far, this one included."""

    def __str__(self) -> str:
        return f"{self.method} for {self.seconds:.0f} s, {self.where}" if self.method else "idle"


class RemoteLearner:
    """Ray's side of a LearnerWorker: constructed empty, so that rank 0 can name a free port on its node first."""

    def __init__(self) -> None:
        die_with_parent()
        self.worker: LearnerWorker | None = None
        self._doing = "", time.monotonic()
        self._thread = threading.get_ident()
        self._calls = 0

    def place(self) -> Place:
        return Place.here()

    def warm(self) -> None:
        """Import what a rank needs, which takes longer than anything else at its start."""
        import deepspeed  # noqa: F401
        from transformers import AutoModelForCausalLM  # noqa: F401

        from . import critic, model, weight_sync  # noqa: F401

    def rendezvous(self) -> tuple[str, int]:
        import ray

        address = ray.util.get_node_ip_address()
        return address, free_port(address)

    def start(self, *args: Any) -> None:
        self._do("start", lambda: setattr(self, "worker", LearnerWorker(*args)))

    def call(self, method: str, *args: Any) -> Any:
        if self.worker is None:
            raise LearnerError(f"{method} before start")
        worker = self.worker
        return self._do(method, lambda: getattr(worker, method)(*args))

    def activity(self) -> Activity:
        """Runs beside `call`, on a thread of its own."""
        method, since = self._doing
        frames = list(stack(sys._current_frames().get(self._thread)))
        return Activity(
            method,
            time.monotonic() - since,
            describe(frames),
            any(part in frame.f_code.co_filename for frame in frames for part in _COLLECTIVES),
            self._calls,
        )

    def _do(self, method: str, work: Any) -> Any:
        self._doing, self._thread = (method, time.monotonic()), threading.get_ident()
        self._calls += 1
        try:
            return work()
        finally:
            self._doing = "", time.monotonic()


def stack(frame: FrameType | None) -> Iterator[FrameType]:
    """Innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def describe(frames: Sequence[FrameType]) -> str:
    """`all_reduce, called from engine/learner.py:333 (_sum_over_ranks)`."""
    ours = [frame for frame in frames if frame.f_code.co_filename.startswith(_FOLDER)]
    if not frames:
        return "not started"
    inner = f"in {frames[0].f_code.co_name}"
    if not ours:
        return inner
    file = os.path.relpath(ours[0].f_code.co_filename, _FOLDER)
    place = f"{file}:{ours[0].f_lineno} ({ours[0].f_code.co_name})"
    return f"at {place}" if ours[0] is frames[0] else f"{inner}, called from {place}"


@dataclass
class _Process:
    """One actor, a rank or a spare."""

    actor: Any
    placing: Any
    warming: Any
    place: Place | None = None
    activity: Activity | None = None
    beat: Any = None
    beat_sent: float = 0.0
    heard: float = 0.0
    idle_beat: Any = None
    lost: str = ""
    """How it died while nobody called it."""


class RayRanks:
    """One Ray actor a rank. Rank 0's node hosts the rendezvous."""

    def __init__(
        self,
        model_path: str,
        config: LearnerConfig,
        losses: Mapping[str, LossFn],
        needs: Mapping[str, frozenset[Need]],
        env: Mapping[str, str],
        gpu_share: float = 1.0,
        token_sampling: TokenSampling | None = None,
        seed: int = 0,
        entropy_top_k: int | None = None,
        seats: Sequence[Mapping[str, Any]] = (),
        deterministic: bool = False,
    ) -> None:
        """`gpu_share` is what a rank claims of its GPU: less than 1 where a rollout worker lives there too.

        `seats` are Ray options for each rank's actor: where it lives. Without them Ray chooses.
        """
        self.world_size = config.num_workers
        self.generation = 0
        """Counts restarts. What ranks of an earlier one still do reaches nobody: they are dead before this grows."""
        self._config = config
        self._options = {
            "num_cpus": 0,
            "num_gpus": gpu_share if config.device == "cuda" else 0,
            "runtime_env": {"env_vars": {**env, "OMP_NUM_THREADS": str(config.num_cpus)}},
        }
        self._learner = (
            (model_path, config, losses, needs),
            (
                token_sampling,
                seed,
                entropy_top_k,
                deterministic,
            ),
        )
        self._seats = seats
        self._spares: list[_Process] = []
        self._begin()

    @property
    def workers(self) -> list[Any]:
        return [process.actor for process in self._ranks]

    def wait_started(self) -> None:
        """Ranks load in the background from construction on, so that other workers can start beside them."""
        self._get(self._starting, "start")
        missing = self._config.num_spares - len(self._spares)
        self._spares += [self._recruit(n % self.world_size, warm=True) for n in range(missing)]

    def call(self, method: str, per_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Raises what a rank raised, or LearnerLost that names the rank that died, is silent, or is late."""
        refs = [
            worker.call.remote(method, *args)
            for worker, args in zip(self.workers, per_rank, strict=True)
        ]
        return self._get(refs, method)

    def restart(self) -> None:
        """Kill what is left of the ranks, whatever they do, and start all of them again; they have no state then."""
        self._kill(self._ranks)
        self.generation += 1
        self._begin()
        self.wait_started()

    def status(self) -> list[dict[str, Any]]:
        """For status.json: what each rank last said, and how long ago."""
        now = time.monotonic()
        rows = []
        for rank, process in enumerate(self._ranks):
            activity = process.activity  # the thread that calls the ranks clears it at any time
            if activity is None:
                rows.append({"rank": rank, "method": "", "lost": idle_loss(process)})
            else:
                said = asdict(activity)
                said["seconds"] = round(said["seconds"], 1)
                ago = round(now - process.heard, 1)
                rows.append({"rank": rank, **said, "said_seconds_ago": ago})
        return rows

    def close(self) -> None:
        """Let every rank clean up for a moment, then end it; never blocks for long."""
        import ray

        refs = [worker.call.remote("close") for worker in self.workers]
        ray.wait(refs, num_returns=len(refs), timeout=CLOSE_SECONDS)
        for process in [*self._ranks, *self._spares]:
            kill_actor(process.actor, process.place)
        self._spares = []

    def _recruit(self, rank: int, *, warm: bool = False) -> _Process:
        import ray

        seat = self._seats[rank] if self._seats else {}
        remote: Any = ray.remote  # its types know no concurrency groups
        make = remote(concurrency_groups={_WATCH: 1})
        actor = make(RemoteLearner).options(**self._options, **seat).remote()
        return _Process(actor, actor.place.remote(), actor.warm.remote() if warm else None)

    def _begin(self) -> None:
        """Fill the ranks with warm spares as far as they go, and start them all."""
        spares = [self._spares.pop(0) for _ in range(min(self.world_size, len(self._spares)))]
        fresh = [self._recruit(rank) for rank in range(len(spares), self.world_size)]
        self._ranks = [*spares, *fresh]
        self._find_places()
        ref = self._ranks[0].actor.rendezvous.remote()
        address, port = self._get([ref], "rendezvous")[0]
        learner, head = self._learner
        self._starting = [
            process.actor.start.remote(*learner, Rank(i, self.world_size, address, port), *head)
            for i, process in enumerate(self._ranks)
        ]

    def _find_places(self) -> None:
        """ClusterError where a rank finds none in time."""
        import ray

        deadline = time.monotonic() + self._config.place_seconds
        for rank, process in enumerate(self._ranks):
            left = max(0.0, deadline - time.monotonic())
            if not ray.wait([process.placing], timeout=left)[0]:
                nodes = sum(node["Alive"] for node in ray.nodes())
                raise ClusterError(
                    f"learner rank {rank} found no place in the cluster within learner.place_seconds = "
                    f"{self._config.place_seconds:g}; {nodes} nodes are alive. Add a node like the one that was lost; "
                    "the run goes on with `plait resume`"
                )

    def _kill(self, processes: Sequence[_Process]) -> None:
        """Fences them: when this returns, those of this node have ended."""
        import ray

        here = ray.get_runtime_context().get_node_id()
        pids = [one.place.pid for one in processes if one.place and one.place.node == here]
        everyone = [pid for one in pids for pid in family(one)]
        for process in processes:
            kill_actor(process.actor, process.place)
        if not all_gone(everyone, CLOSE_SECONDS):
            raise LearnerError(f"learner ranks {pids} do not end after SIGKILL")

    def _get(self, refs: list[Any], method: str) -> list[Any]:
        """Answers of the first len(refs) ranks; the first failure is raised at once, with its own type and message."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        deadline = time.monotonic() + self._config.timeout_seconds
        pending = {ref: rank for rank, ref in enumerate(refs)}
        answers: dict[int, Any] = {}
        while pending:
            for ref in ray.wait(list(pending), timeout=_TICK)[0]:
                rank = pending.pop(ref)
                try:
                    answers[rank] = ray.get(ref)
                except RayActorError as error:
                    raise self._died(rank, method, error) from error
                except RayTaskError as error:
                    raise self._failed(rank, method, error, pending) from error
            self._listen(list(pending.values()), method)
            if pending and time.monotonic() > deadline:
                raise self._late(list(pending.values()), method)
        for process in self._ranks:
            process.activity = None
        return [answers[rank] for rank in range(len(refs))]

    def _failed(self, rank: int, method: str, error: Any, pending: Mapping[Any, int]) -> Exception:
        """What a rank raised; LearnerLost where that is only because another rank has gone."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        cause = error.cause or error
        if is_out_of_memory(cause):
            # Python's own has no text.
            said = str(cause).partition("\n")[0] or type(cause).__name__
            return LearnerError(
                f"learner rank {rank} ran out of memory in {method}: {said}. Lower "
                "learner.max_tokens_per_micro_batch or learner.logit_chunk_tokens, or set gradient_checkpointing, "
                "offload_optimizer or a higher zero_stage of the learner"
            )
        if isinstance(cause, PlaitError) or self.world_size == 1:
            return cause
        beats = {
            one.actor.activity.options(concurrency_group=_WATCH).remote(): i
            for i, one in enumerate(self._ranks)
        }
        waiting = {**pending, **beats}
        end = time.monotonic() + _SETTLE_SECONDS
        while waiting and time.monotonic() < end:
            for ref in ray.wait(list(waiting), timeout=_TICK)[0]:
                other = waiting.pop(ref)
                try:
                    ray.get(ref)
                except RayActorError as death:
                    return self._died(other, method, death)
                except RayTaskError:
                    continue
        if "gloo" in str(cause).lower() or "nccl" in str(cause).lower():
            return LearnerLost(f"learner rank {rank} lost its peers in {method}: {cause}")
        return cause

    def _died(self, rank: int, method: str, error: Exception) -> LearnerLost:
        last = self._ranks[rank].activity
        doing = f" (last seen in {last})" if last is not None and last.method else ""
        return LearnerLost(f"learner rank {rank} died in {method}{doing}: {how_it_died(error)}")

    def _listen(self, waited_for: Sequence[int], method: str) -> None:
        """Send and receive heartbeats; LearnerLost names a rank that has been silent for too long."""
        import ray
        from ray.exceptions import RayActorError

        now = time.monotonic()
        for rank, process in enumerate(self._ranks):
            try:
                if process.place is None and is_ready(process.placing):
                    process.place = ray.get(process.placing)
                if process.beat is not None and is_ready(process.beat):
                    process.activity, process.beat = ray.get(process.beat), None
                    process.heard = now
            except RayActorError as error:
                raise self._died(rank, method, error) from error
            if process.beat is None:
                if process.place is not None and now - process.beat_sent >= _BEAT_SECONDS:
                    process.beat_sent = now
                    process.beat = process.actor.activity.options(concurrency_group=_WATCH).remote()
            elif rank in waited_for and now - process.beat_sent > self._config.silence_seconds:
                raise LearnerLost(
                    f"learner rank {rank} gave no sign of life for learner.silence_seconds = "
                    f"{self._config.silence_seconds:g} in {method} (last seen in {process.activity})",
                    stuck=True,
                )

    def _late(self, ranks: Sequence[int], method: str) -> LearnerLost:
        """Who of those that have not answered is to blame: the ranks outside a collective, where there are any."""
        late = [
            rank
            for rank in ranks
            if (activity := self._ranks[rank].activity) is None or not activity.in_collective
        ]
        told = "; ".join(f"rank {i}: {self._ranks[i].activity or 'never heard'}" for i in ranks)
        names = ", ".join(map(str, late or ranks))
        return LearnerLost(
            f"learner rank {names} did not finish {method} within learner.timeout_seconds = "
            f"{self._config.timeout_seconds:g} ({told})",
            stuck=True,
        )


def idle_loss(process: _Process) -> str:
    """How a rank died that nobody calls now, as far as it is known: each question is answered by the next."""
    import ray
    from ray.exceptions import RayActorError

    if process.idle_beat is not None and is_ready(process.idle_beat):
        try:
            ray.get(process.idle_beat)
        except RayActorError as error:
            process.lost = how_it_died(error)
        process.idle_beat = None
    if process.idle_beat is None and not process.lost:
        process.idle_beat = process.actor.activity.options(concurrency_group=_WATCH).remote()
    return process.lost


def is_out_of_memory(error: BaseException) -> bool:
    """Of the host (Python's MemoryError, torch's allocator) or of a GPU."""
    words = ("can't allocate memory", "out of memory", "Cannot allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def is_ready(ref: Any) -> bool:
    import ray

    return bool(ray.wait([ref], timeout=0)[0])
