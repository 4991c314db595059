"""Scoring processes behind one queue.

One driver thread for each process takes jobs from the queue, hands one at a time to its process and waits for the
reply or the deadline. A job that hangs, crashes or eats memory costs its own process, which is killed with all its
descendants and replaced, and its own score, which becomes UNKNOWN; everything else goes on.
"""

import atexit
import itertools
import os
import queue
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..engine.errors import ConfigError, PlaitError, RewardError
from ..engine.types import Score
from . import guard
from .config import RewardConfig
from .frames import RewardSource
from .process import START_SECONDS, Cancelled, Lost, ScoringProcess

_CLOSE_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """One completion to grade. The callbacks run on a thread of the pool."""

    source: RewardSource
    prompt: bytes
    """A pickled Prompt."""
    completion: str
    done: Callable[[Score], None]
    fail: Callable[[PlaitError], None]
    """Called instead of `done` when the reward function itself cannot be had."""
    wanted: Callable[[], bool]
    """A queued job whose answer nobody wants any more is dropped."""
    attempts: int = 0


class ProcessPool:
    """`config.num_workers` scoring processes, started in the background at construction. Linux only.

    Each imports `sources` when it starts, other functions when a job asks for them.
    """

    def __init__(
        self, config: RewardConfig, sources: Sequence[RewardSource], working_dir: str
    ) -> None:
        self._config = config
        self._sources = sources
        self._working_dir = working_dir
        self._mark = secrets.token_hex(8)
        self._driver = os.getpid()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._failure: PlaitError | None = None
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, self._mark],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._started = [threading.Event() for _ in range(config.num_workers)]
        # The kernel ends a process with the *thread* that started it, so these live as long as the pool.
        self._threads = [
            threading.Thread(target=self._serve, args=(n,), name=f"plait-scoring-{n}", daemon=True)
            for n in range(config.num_workers)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def wait_ready(self) -> None:
        """Block until every process has imported the run's functions; raises what `check` raises."""
        deadline = time.monotonic() + START_SECONDS + 1.0
        for started in self._started:
            started.wait(max(0.0, deadline - time.monotonic()))
        self.check()

    def check(self) -> None:
        """Raises ConfigError when a function cannot be imported, RewardError when the pool cannot work."""
        if self._failure is not None:
            raise self._failure
        if self._closing.is_set():
            raise RewardError("the scorer is closed")
        if not all(thread.is_alive() for thread in self._threads):
            raise RewardError("a scoring thread ended unexpectedly; its traceback is on stderr")

    def close(self) -> None:
        """Kill all processes and wait for them. Does nothing the second time, or in a fork of the driver."""
        if self._closing.is_set() or os.getpid() != self._driver:
            return
        self._closing.set()
        atexit.unregister(self.close)
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        try:  # the guard ends when its standard input does, after killing whatever is left
            self._guard.communicate(timeout=_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()

    def _serve(self, number: int) -> None:
        """One thread: start a process, feed it until it is lost, start the next."""
        for generation in itertools.count():
            process = None
            try:
                process = self._start(f"{self._mark}-{number}-{generation}.")
                self._started[number].set()
                self._feed(process)
            except Cancelled:
                return
            except (PlaitError, OSError) as error:
                is_ours = isinstance(error, PlaitError)
                self._failure = error if is_ours else RewardError(f"no scoring process: {error}")
                self._started[number].set()
                return
            finally:
                if process is not None:
                    process.kill()

    def _start(self, mark: str) -> ScoringProcess:
        memory = self._config.max_memory_mib
        process = ScoringProcess(mark, self._working_dir, memory, self._closing.is_set)
        try:
            for source in self._sources:
                self._load(process, source)
        except BaseException:
            process.kill()
            raise
        return process

    def _load(self, process: ScoringProcess, source: RewardSource) -> None:
        try:
            process.load(source)
        except Lost as lost:
            raise RewardError(
                f"{source.path} = {source.name!r} could not be loaded: {lost.reason}"
            ) from lost

    def _feed(self, process: ScoringProcess) -> None:
        """Returns when the process is lost or has retired. Raises Cancelled when the pool closes."""
        while (job := self._jobs.get()) is not None:
            if not job.wanted():
                continue
            try:
                self._load(process, job.source)
            except ConfigError as error:
                job.fail(error)
                continue
            except RewardError as error:
                if not self._retry(job):
                    job.fail(error)
                return
            if not self._grade(process, job):
                return
        raise Cancelled

    def _grade(self, process: ScoringProcess, job: Job) -> bool:
        """Whether the process is good for another job."""
        timeout = self._config.timeout_seconds
        try:
            score, retired = process.grade(job.source, job.prompt, job.completion, timeout)
        except Lost as lost:
            if lost.accepted or not self._retry(job):
                job.done(Score.unknown(lost.reason))
            return False
        job.done(score)
        return not retired

    def _retry(self, job: Job) -> bool:
        """Once, give the job to another process: the sample before it may have left this one broken."""
        if job.attempts:
            return False
        self._jobs.put(replace(job, attempts=1))
        return True
