"""Writing that survives a crash: flushed to the disk, hashed while it is written, renamed into place.

Tensors are written as safetensors, piece by piece from the memory they are in.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError
from .failpoints import reach

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 24
DOING = "the checkpoint cannot be written"
DTYPE_NAMES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.int64": "I64",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}
"""Safetensors' names of what a learner's state consists of."""


@dataclass(frozen=True)
class FileRecord:
    """What a written file must still be when it is read."""

    path: str
    """Relative to the folder it belongs to, with / between its parts."""
    bytes: int
    sha256: str


@contextmanager
def storage_errors(path: Path | str, doing: str) -> Iterator[None]:
    """What the operating system says against a write becomes a CheckpointError that names place and remedy."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{doing}: {error.strerror or error} ({error.filename or path}). Free or mount space there, make it "
            "writable, or choose another run.dir; what was saved before is untouched"
        ) from error


def write_durably(path: Path, text: str) -> FileRecord:
    """Write a new file and flush it."""
    data = text.encode()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(path.name, len(data), hashlib.sha256(data).hexdigest())


def replace_durably(path: Path, text: str) -> None:
    """Readers see the old content or the new one, also after a crash."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_durably(partial, text)
        reach("durable.partial_written")
        partial.rename(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush which names a folder holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def probe_folder(folder: Path, seconds: float) -> None:
    """Write, flush, rename and remove a small file, as a checkpoint will; raises CheckpointError, also after `seconds`.

    A thread does it: a file system that hangs must not take the caller with it.
    """
    problem: list[BaseException | None] = []

    def try_writing() -> None:
        path = folder / f".probe-{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_durably(path, "x" * 4096)
            path.unlink()
        except OSError as error:
            problem.append(error)
        else:
            problem.append(None)

    thread = Thread(target=try_writing, daemon=True)
    thread.start()
    thread.join(seconds)
    with storage_errors(folder, "checkpoints cannot be written"):
        if not problem:
            raise TimeoutError(
                errno.ETIMEDOUT, f"a small file took longer than {seconds:g} s", str(folder)
            )
        if problem[0] is not None:
            raise problem[0]


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> FileRecord:
    """A new safetensors file of tensors in host memory, flushed; `facts` is JSON in its header."""
    # Larger elements first: every tensor then begins at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header = header_of({name: tensors[name] for name in names}, facts)
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:

        def write(data: memoryview) -> None:
            nonlocal size
            for start in range(0, len(data), CHUNK):
                chunk = data[start : start + CHUNK]
                digest.update(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) :]
            size += len(data)

        write(memoryview(header))
        reach("checkpoint.learner_opened")
        for name in names:
            write(raw_bytes(tensors[name]))
            reach("checkpoint.tensor_written")
        reach("checkpoint.learner_written")
        os.fsync(file.fileno())
    return FileRecord(path.name, size, digest.hexdigest())


def header_of(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """Safetensors: length of the header in 8 bytes, the header as JSON, padded to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"facts": json.dumps(facts)}}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPE_NAMES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw_bytes(tensor: Tensor) -> memoryview:
    """Of a contiguous tensor in host memory; no copy."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
