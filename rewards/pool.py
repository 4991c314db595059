"""Scoring processes behind one queue.

One driver thread for each process takes jobs from the queue, keeps its process supplied with some milliseconds of
work, and waits for scores or the deadline of the one that runs. A job that hangs, crashes or eats memory costs its own
process, which is killed with all its descendants and replaced, and its own score, which becomes UNKNOWN; what its
process had not begun with goes back to the queue, and everything else goes on.
"""

import atexit
import itertools
import os
import queue
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ..engine import guard
from ..engine.errors import ConfigError, PlaitError, RewardError
from ..engine.types import Score
from .config import RewardConfig
from .frames import RewardSource
from .process import START_SECONDS, Cancelled, Lost, ScoringProcess

_CLOSE_SECONDS = 5.0
_AHEAD_SECONDS = 0.06
"""Work that a process has before it: much more than the driver needs to notice and send more."""
_MAX_AHEAD = 64
_PAUSE_SECONDS = 0.02
"""At most, between looks at a process that has work before it; each look takes a core from the processes."""
_SLOW_SECONDS = 0.1
"""A sample that runs for so long lets those behind it go to other processes."""


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
        self._example: Job | None = None
        """A job that was graded well: replacements begin with it, since first calls are slow."""
        self._guard = guard.start(guard.SCORING, self._mark)
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
                if generation == 0 or self._warm(process):
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

    def _warm(self, process: ScoringProcess) -> bool:
        """Grade the example, for nobody. Whether the process is good for jobs after it."""
        example = self._example
        if example is None or example.source not in process.loaded:
            return True
        try:
            process.submit(example.source, example.prompt, example.completion)
            process.flush()
            while not (graded := process.collect(self._config.timeout_seconds)):
                pass
            is_good = not graded[0].last
        except Lost:
            is_good = False
        if not is_good:
            self._example = None  # else no replacement would ever get to the queue
        return is_good

    def _feed(self, process: ScoringProcess) -> None:
        """Returns when the process is lost or has retired. Raises Cancelled when the pool closes."""
        sent: dict[int, Job] = {}
        call_seconds: float | None = None
        while True:
            try:
                if not self._supply(process, sent, call_seconds):
                    return
                if len(sent) > 1:
                    time.sleep(min(_PAUSE_SECONDS, 0.5 * len(sent) * (call_seconds or 0.0)))
                for graded in process.collect(self._config.timeout_seconds):
                    job = sent.pop(graded.id)
                    job.done(graded.score)
                    if graded.last:
                        self._requeue(sent, sent)
                        return
                    if graded.score.reward is not None:
                        self._example = job
                    earlier = graded.seconds if call_seconds is None else call_seconds
                    call_seconds = 0.8 * earlier + 0.2 * graded.seconds
                if len(sent) > 1 and process.running_seconds() > _SLOW_SECONDS:
                    self._requeue(sent, process.take_back())
            except Lost as lost:
                self._give_up(sent, process.take_back(), lost)
                return

    def _supply(
        self, process: ScoringProcess, sent: dict[int, Job], call_seconds: float | None
    ) -> bool:
        """Wait for a job where the process has none; send more ahead of time where calls are short.

        No more than this process's part of what waits, so that all of them end together.
        """
        ahead = _MAX_AHEAD if call_seconds == 0 else int(_AHEAD_SECONDS / (call_seconds or 1.0))
        part = -(-self._jobs.qsize() // len(self._threads))
        ahead = max(1, min(ahead, _MAX_AHEAD, len(sent) + part))
        while len(sent) < ahead and process.has_room:
            try:
                job = self._jobs.get(block=not sent)
            except queue.Empty:
                break
            if job is None:
                raise Cancelled
            if not job.wanted():
                continue
            if sent and job.source not in process.loaded:
                self._jobs.put(job)  # functions are loaded when nothing else is under way
                break
            if not sent and not self._prepare(process, job):
                return False
            if job.source in process.loaded:
                sent[process.submit(job.source, job.prompt, job.completion)] = job
        process.flush()
        return True

    def _prepare(self, process: ScoringProcess, job: Job) -> bool:
        """Load what an idle process needs for a job, or fail the job. Whether the process is good for another one."""
        if not process.alive:  # it ended while idle: no sample's doing
            self._jobs.put(job)
            return False
        try:
            self._load(process, job.source)
        except ConfigError as error:
            job.fail(error)
        except RewardError as error:
            if not self._retry(job):
                job.fail(error)
            return False
        return True

    def _give_up(self, sent: dict[int, Job], untouched: Sequence[int], lost: Lost) -> None:
        """The process is lost with what it was grading; what it had not begun with goes to another one."""
        self._requeue(sent, untouched[1:] if len(untouched) == len(sent) else untouched)
        for message_id, job in sent.items():
            # One that was not begun, or not the first in doubt, is not the culprit: the sample before it may be.
            begun_first = message_id == min(sent) and message_id not in untouched
            is_culprit = begun_first and not lost.from_outside
            if is_culprit or not self._retry(job):
                job.done(Score.unknown(lost.reason))

    def _requeue(self, sent: dict[int, Job], ids: Iterable[int]) -> None:
        for message_id in list(ids):
            self._jobs.put(sent.pop(message_id))

    def _retry(self, job: Job) -> bool:
        """Once, give the job to another process: what this one ended of may not have been the job's doing."""
        if job.attempts:
            return False
        self._jobs.put(replace(job, attempts=1))
        return True
