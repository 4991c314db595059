"""SIGTERM and Ctrl-C ask a run to stop; a second Ctrl-C ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..engine.stop import StopRequest

ENDED_AT_ONCE = 128 + signal.SIGINT
"""Exit code, as a shell reports it; nothing is written then, and the journal has what was sampled."""


@contextmanager
def stopped_by_signals() -> Iterator[StopRequest]:
    """The request that signals make. Outside of the main thread, where Python takes none, nobody makes it."""
    stop = StopRequest()

    def ask(number: int, frame: Any) -> None:
        if stop.reason and number == signal.SIGINT:
            tell("ended at once")
            os._exit(ENDED_AT_ONCE)
        name = signal.Signals(number).name
        if not stop.reason:
            tell(f"{name}: writes a checkpoint and ends; Ctrl-C (again) ends at once")
        stop.ask(name)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tell(text: str) -> None:
    """Past sys.stderr, which may be in the middle of a write, or no file (a notebook's)."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
