"""The rollout workers of a pool, watched: one that died or went silent is killed, and another starts in its place.

A thread sends every worker a heartbeat each second, which goes through the actor into vLLM's own process. Nothing here
draws samples or sends weights: pool.py asks who is up, and says whom it found broken.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ..engine.errors import RolloutError
from ..engine.processes import Place, how_it_died, kill_actor
from .config import RolloutConfig

TICK = 0.2
"""Seconds between two looks at the workers."""
_BEAT_SECONDS = 1.0


@dataclass(eq=False)
class Member:
    """One worker as the pool sees it."""

    name: str
    actor: Any
    starting: Any
    """Ray's reference to the call of `start`."""
    placing: Any
    seat: int
    """Its number among the places that the run has reserved for workers."""
    spare: bool = False
    failures: int = 0
    """Workers of this name in a row, before this one, that never finished a sample."""
    since: float = field(default_factory=time.monotonic)
    """When it began what it does now: waiting for a place, starting, serving."""
    place: Place | None = None
    is_up: bool = False
    lost: str = ""
    """Why it is not used any more."""
    silent: bool = False
    """It was alive, as far as one knows, and did not answer."""
    version: int | None = None
    """Of the weights that it is proved to serve; None: those it was started with."""
    outstanding: int = 0
    finished: int = 0
    """Samples."""
    last_sample: float = 0.0
    beat: Any = None
    beat_sent: float = 0.0

    @property
    def state(self) -> str:
        if self.is_up:
            return "is spare" if self.spare else "serves"
        return "waits for a place in the cluster" if self.place is None else "is starting"

    @property
    def seconds(self) -> float:
        """In this state."""
        return time.monotonic() - self.since

    def __str__(self) -> str:
        return f"{self.name} {self.state} for {self.seconds:.0f} s"


@dataclass(frozen=True, slots=True)
class Loss:
    """One worker that was lost, when (time.monotonic), and why."""

    worker: str
    reason: str
    at: float


class Crew:
    """`num_workers` workers and `num_spares` that wait to take the place of a lost one."""

    def __init__(self, recruit: Callable[[str, int], Any], config: RolloutConfig) -> None:
        """`recruit(name, seat)` creates an actor with RolloutWorker's methods. All start in the background."""
        self._recruit, self._config = recruit, config
        self.tell: Callable[[str], None] = lambda message: None
        """Gets one line about each loss and each return; called on the watching thread too."""
        self.losses: list[Loss] = []
        self.failure: RolloutError | None = None
        """Set when a worker failed at its first start, or the last one was given up: nothing is worth waiting for."""
        self.begun = False
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._numbers = itertools.count()
        seats = range(config.num_workers)
        self._members = [self._enlist(seat) for seat in seats]
        self._members += [
            self._enlist(n % config.num_workers, spare=True) for n in range(config.num_spares)
        ]
        self._watch = threading.Thread(target=self._look, name="plait-rollout-watch", daemon=True)
        self._watch.start()

    def begin(self) -> None:
        """From now on lost workers are replaced; before, the first loss is a failure."""
        self.begun = True

    def everyone(self) -> list[Member]:
        with self._lock:
            return list(self._members)

    @property
    def members(self) -> list[Member]:
        """Those that are not spare."""
        return [member for member in self.everyone() if not member.spare]

    def up(self) -> list[Member]:
        return [member for member in self.members if member.is_up]

    def lose(self, member: Member, reason: str, *, silent: bool = False) -> None:
        """Kill a worker and start another in its place; does nothing for one that is lost already."""
        with self._lock:
            if member.lost or self._closed.is_set():
                return
            member.lost, member.silent = reason, silent
            self._members.remove(member)
            self.losses.append(Loss(member.name, reason, time.monotonic()))
            kill_actor(member.actor, member.place)
            if not self.begun:
                self.failure = self.failure or RolloutError(f"rollout worker {reason}")
            else:
                self._replace(member)

    def close(self) -> None:
        """Kill the workers; their vLLM processes go with them. Does not wait for that."""
        with self._lock:
            self._closed.set()
            for member in self._members:
                kill_actor(member.actor, member.place)
            self._members = []
        self._watch.join()

    def _enlist(self, seat: int, *, spare: bool = False, failures: int = 0) -> Member:
        name = f"rollout-{next(self._numbers)}"
        actor = self._recruit(name, seat)
        placing = actor.place.remote()
        return Member(name, actor, actor.start.remote(), placing, seat, spare, failures)

    def _replace(self, member: Member) -> None:
        failures = 0 if member.finished else member.failures + 1
        given_up = failures > self._config.max_restarts
        spare = next((s for s in self._members if s.spare and (s.is_up or given_up)), None)
        if spare is not None and not member.spare:
            spare.spare, member.spare, spare.since = False, True, time.monotonic()
            self.tell(f"{member.lost}; {spare.name} takes over")
        if given_up:
            self.tell(f"given up after {failures} workers in a row: {member.lost}")
            if not self._members:
                self.failure = RolloutError(
                    f"no rollout worker is left after rollouts.max_restarts = {failures - 1}; "
                    f"the last: {member.lost}"
                )
            return
        fresh = self._enlist(member.seat, spare=member.spare, failures=failures)
        self._members.append(fresh)
        self.tell(f"{member.lost}; {fresh.name} starts")

    def _look(self) -> None:
        while not self._closed.wait(TICK):
            for member in self.everyone():
                try:
                    self._check(member)
                except RayError as error:
                    self.lose(member, explain(member.name, error))

    def _check(self, member: Member) -> None:
        """Raises RayError when the worker failed or died."""
        if not member.is_up:
            self._check_start(member)
        elif member.beat is None:
            if time.monotonic() - member.beat_sent >= _BEAT_SECONDS:
                member.beat, member.beat_sent = member.actor.beat.remote(), time.monotonic()
        elif is_ready(member.beat):
            ray.get(member.beat)
            member.beat = None
        elif time.monotonic() - member.beat_sent > self._config.silence_seconds:
            seconds = self._config.silence_seconds
            reason = (
                f"{member.name} gave no sign of life for rollouts.silence_seconds = {seconds:g}"
            )
            self.lose(member, reason, silent=True)

    def _check_start(self, member: Member) -> None:
        now = time.monotonic()
        if member.place is None and is_ready(member.placing):
            member.place, member.since = ray.get(member.placing), now
        if is_ready(member.starting):
            ray.get(member.starting)
            with self._lock:
                member.is_up, member.since = True, now
        elif member.place and now - member.since > self._config.start_timeout_seconds:
            reason = f"{member.name} did not finish start before its deadline"
            self.lose(member, reason, silent=True)


def is_ready(ref: Any) -> bool:
    return bool(ray.wait([ref], timeout=0)[0])


def explain(name: str, error: RayError) -> str:
    """One line: what the worker raised, or how it died."""
    if isinstance(error, RayTaskError):
        cause = str(error.cause or error).strip().removeprefix("rollout worker ")
        return cause if cause.startswith(name) else f"{name} failed: {cause}"
    return f"{name} died: {how_it_died(error)}"
