"""manifest.json of a checkpoint: every file with its size and sha256, and what the checkpoint belongs to.

A checkpoint is only read after all of it was found to be what the manifest says, and the manifest to be what was
written: it holds a digest of itself, and no other bytes are accepted for its content.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .durable import FileRecord, hash_file
from .errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    step: int
    world_size: int
    """Learner ranks that wrote it; any other number can read it."""
    files: tuple[FileRecord, ...]
    accuracy: float | None = None
    """Of the evaluation after this very step; None where there was none."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """Versions, configuration, model, tokenizer and data of the run, as `launch` describes them."""

    def to_text(self) -> str:
        return sealed({"format": FORMAT, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises CheckpointError where it is missing or not as it was written."""
        content = unsealed(folder / MANIFEST)
        if content.pop("format", None) != FORMAT:
            raise CheckpointError(f"{folder / MANIFEST}: written in another format than {FORMAT}")
        files = tuple(FileRecord(**record) for record in content.pop("files"))
        return cls(**content, files=files)

    def verify(self, folder: Path) -> None:
        """Raises CheckpointError naming the first file that is not what the manifest says."""
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda record: check_file(folder, record), self.files))

    def under(self, folder: Path, prefix: str) -> list[Path]:
        """Its files in the subfolder `prefix`."""
        paths = [PurePosixPath(record.path) for record in self.files]
        return [folder / path for path in paths if path.parts[0] == prefix]


def sealed(content: Mapping[str, Any]) -> str:
    """JSON with a digest of itself: any change of a byte is found by `unsealed`."""
    body = json.dumps(content, indent=1, sort_keys=True)
    return json.dumps({"content": content, "sha256": digest(body)}, indent=1, sort_keys=True) + "\n"


def unsealed(path: Path) -> dict[str, Any]:
    """The content of a sealed file; raises CheckpointError where it is missing, a link, or has changed."""
    try:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link; a checkpoint holds its own files only")
        text = path.read_bytes().decode()
        content = json.loads(text)["content"]
        intact = isinstance(content, dict) and sealed(content) == text
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not intact:
        raise CheckpointError(f"{path} is not as it was written")
    return content


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_file(folder: Path, record: FileRecord) -> None:
    path = inside(folder, record.path)
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} is no plain file; a checkpoint holds its own files only")
        if found.st_size != record.bytes:
            raise CheckpointError(f"{path} has {found.st_size} bytes, {record.bytes} were written")
        if hash_file(path) != record.sha256:
            raise CheckpointError(f"{path} is not as it was written: its sha256 differs")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def inside(folder: Path, name: str) -> Path:
    """`folder / name`; raises CheckpointError where that leads out of the folder, also by a link."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise CheckpointError(f"{folder}: the manifest names {name!r}, which leads out of it")
    path = folder
    for part in (None, *pure.parts[:-1]):
        path = path if part is None else path / part
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link; a checkpoint holds its own files only")
    return folder / pure
