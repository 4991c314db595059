"""One of two processes that want the same run folder."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from plait.engine.errors import RunInUse
from plait.launch.run_lock import lock_run


def hold(folder: Path, start: Any, answer: Any) -> None:
    """Try to take the folder; the one that gets it writes its name, and reads it again, until it is killed."""
    start.wait()
    try:
        with lock_run(folder):
            (folder / "writer").write_text(str(os.getpid()))
            answer.send(("held", os.getpid()))
            signal.pause()
    except RunInUse as error:
        answer.send((str(error), os.getpid()))
