"""Inside a scoring process: import reward functions, grade what the driver has tickets for, one after the other.

Everything here runs on the process's main thread. The process belongs to the driver: it dies with it, and the driver
kills it when a sample takes too long. The function's standard output and error go to a pipe that the driver
drains; requests and replies have pipes of their own.
"""

import asyncio
import ctypes
import inspect
import json
import math
import numbers
import os
import pickle
import reprlib
import resource
import signal
import sys
import time
import traceback
from collections.abc import Awaitable
from pathlib import Path
from typing import SupportsFloat, TypeGuard

import numpy as np

from ..engine.contracts import RewardFn
from ..engine.errors import ConfigError
from ..engine.types import Score, ScoreStatus
from . import resolve
from .frames import (
    TICKET_BYTES,
    FrameReader,
    Load,
    RewardSource,
    Task,
    pack_event,
    pack_score,
    read_exactly,
    unpack_tickets,
    write_all,
)

_PR_SET_PDEATHSIG = 1


class Worker:
    """One scoring process. `requests`, `tickets` and `replies` are file descriptors, `max_memory` is in bytes."""

    def __init__(self, requests: int, tickets: int, replies: int, max_memory: int) -> None:
        self._frames = FrameReader(requests)
        self._tickets = tickets
        self._replies = replies
        self._max_memory = max_memory
        self._functions: dict[RewardSource, RewardFn] = {}
        self._runner: asyncio.Runner | None = None
        self._pid = os.getpid()

    def serve(self) -> None:
        """Until the driver closes the pipes, or a sample leaves the process in doubt."""
        while (message := self._next_message()) is not None:
            if isinstance(message, Load):
                write_all(self._replies, self._load(message))
                continue
            started = time.perf_counter()
            score, last = self._grade(message)
            if os.getpid() != self._pid:
                os._exit(0)  # a fork made by the function came back here: it must not speak for us
            seconds = time.perf_counter() - started
            write_all(self._replies, pack_score(message.id, score, seconds, last=last))
            if last:
                return

    def _next_message(self) -> Load | Task | None:
        """What the next ticket is for; messages before it were taken back."""
        ticket = read_exactly(self._tickets, TICKET_BYTES)
        if ticket is None:
            return None
        (wanted,) = unpack_tickets(ticket)
        while (frame := self._frames.take()) is not None:
            message: Load | Task = pickle.loads(frame)
            if message.id == wanted:
                return message
        return None

    def _load(self, message: Load) -> bytes:
        """Import under no memory limit, then limit what may come on top of what is loaded now."""
        _limit_memory(None)
        try:
            self._functions[message.source] = load_function(message.source)
        except ConfigError as error:
            return pack_event(message.id, "refused", message=error.problems[0].message)
        except BaseException as error:  # noqa: BLE001  (importing a user's module may do anything)
            return pack_event(message.id, "refused", message=f"importing failed: {describe(error)}")
        _limit_memory(self._max_memory)
        return pack_event(message.id, "loaded")

    def _grade(self, task: Task) -> tuple[Score, bool]:
        """The score, and whether the process should end because its state is in doubt."""
        try:
            value: object = self._functions[task.source](pickle.loads(task.prompt), task.completion)
            if inspect.isawaitable(value):
                if self._runner is None:
                    self._runner = asyncio.Runner()
                value = self._runner.run(_wait_for(value))
            return to_score(value), False
        except BaseException as error:  # noqa: BLE001
            # The one place where arbitrary user code runs. Whatever it raises, SystemExit and math-verify's
            # BaseException included, says that this sample has no score: UNKNOWN, never 0.
            fatal = isinstance(error, MemoryError) or not isinstance(error, Exception)
            return Score.unknown(describe(error)), fatal


def load_function(source: RewardSource) -> RewardFn:
    """Raises ConfigError at `source.path`, and whatever unpickling a function raises."""
    function = None if source.pickled is None else pickle.loads(source.pickled)
    options = json.loads(source.options)
    return resolve(source.name, path=source.path, options=options, function=function)


async def _wait_for(value: Awaitable[object]) -> object:
    return await value


def to_score(value: object) -> Score:
    """What a reward function returned, as a Score: finite numbers and valid Scores pass, all else is UNKNOWN."""
    if value is None:
        return Score.unknown("returned None")
    if isinstance(value, Score):
        return _checked(value)
    if not _is_number(value):
        text = reprlib.repr(value)
        return Score.unknown(f"returned {type(value).__name__} {text}, not a number")
    number = float(value)
    return Score.ok(number) if math.isfinite(number) else Score.unknown(f"returned {number}")


def _checked(score: Score) -> Score:
    if score.status is not ScoreStatus.OK:
        return Score.unknown(str(score.reason) or "the function gave no reason")
    reward = to_score(score.reward)
    if reward.reward is None:
        return Score.unknown(f"{reward.reason} inside a Score")
    parts = {}
    for name, part in score.parts.items():
        if not _is_number(part) or not math.isfinite(part):
            return Score.unknown(f"part {name!r} of the Score is {reprlib.repr(part)}")
        parts[str(name)] = float(part)
    if not isinstance(score.answer, str | None):
        return Score.unknown(f"the answer of the Score is {reprlib.repr(score.answer)}, not text")
    return Score.ok(reward.reward, parts, score.answer)


def _is_number(value: object) -> TypeGuard[SupportsFloat]:
    return isinstance(value, numbers.Real | np.bool_)


def describe(error: BaseException) -> str:
    """Type, message and the line that raised, on one line."""
    text = traceback.format_exception_only(error)[-1].strip()
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{text}{where}"


def _limit_memory(extra: int | None) -> None:
    """Bound the address space to what is mapped now plus `extra` bytes; None lifts the bound."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = hard
    if extra is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        soft = pages * resource.getpagesize() + extra
        if hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _die_with(driver: int) -> None:
    """Have the kernel kill this process when the driver's thread that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != driver:  # it ended before the line above
        os._exit(1)


def main(driver: int, requests: int, tickets: int, replies: int, max_memory: int) -> None:
    """Entry point of the process: the driver's pid, three file descriptors, bytes."""
    _die_with(driver)
    # `ray job stop` signals all processes below the driver; this one ends when the driver says so. A handler, not
    # SIG_IGN: programs that the function starts must not inherit it.
    signal.signal(signal.SIGTERM, lambda *_: None)
    for fd in (requests, tickets, replies):
        os.set_inheritable(fd, False)  # programs started by the function must not hold them open
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # When the machine runs out of memory, the kernel should end this process, not the trainer.
    Path("/proc/self/oom_score_adj").write_text("1000")
    Worker(requests, tickets, replies, max_memory).serve()
    sys.stdout.flush()
    os._exit(0)  # not waiting for threads that a function left behind
