"""One process writes a run folder, or one of collected rows, at a time.

The lock is the kernel's (flock on RUN/lock), so it ends with its holder however that ends; who holds it is written
into the file, for people.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from ..engine.durable import storage_errors
from ..engine.errors import RunInUse

LOCK_FILE = "lock"


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made where it is missing.

    Raises RunInUse where another process holds it. A holder that died leaves no lock, only its name, which is said.
    """
    with storage_errors(folder, "the run folder cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        take(descriptor, folder)
        left = read_owner(descriptor)
        if left:
            print(f"taken over: {folder} from {left}, which ended without a word", file=sys.stderr)
        write_owner(descriptor, describe_owner())
        try:
            yield
        finally:
            write_owner(descriptor, "")
    finally:
        os.close(descriptor)  # and with it the lock


def take(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = read_owner(descriptor) or "a process that is just starting or ending"
        raise RunInUse(
            f"{folder} is in use by {owner}. Wait for it, stop it, or choose another folder"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        print(
            f"warning: the file system of {folder} has no locks ({error.strerror}): make sure that no other process "
            "trains there",
            file=sys.stderr,
        )


def describe_owner() -> str:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": since})


def read_owner(descriptor: int) -> str:
    """ "process 7 on node-2 since ..."; "" where the last holder gave the folder back."""
    text = os.pread(descriptor, 4096, 0).decode(errors="replace").strip()
    try:
        owner = json.loads(text)
        return f"process {owner['process']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return text


def write_owner(descriptor: int, owner: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, owner.encode(), 0)
