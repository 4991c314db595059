"""What a learner is made of, by parameter name: the same content whatever the number of ranks and the ZeRO stage.

A model has columns, each as large as its trained parameters: `master` (the float32 weights), the moments of every set
(`main.exp_avg`) and, where a mask is kept, `mask`. Each rank writes the pieces that it holds, so nothing is gathered; a
piece is a run of entries of one flattened parameter, and a piece that is the whole parameter has its shape. Whoever
reads puts the pieces of all files together again, which is what makes another number of ranks or another stage read it.

Tensors are named MODEL/COLUMN/PARAMETER, and MODEL/COLUMN/PARAMETER@FIRST where a piece is not the whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError

Facts = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """Entries `first:first + length` of a flattened tensor of that shape."""

    shape: tuple[int, ...]
    first: int
    length: int

    @property
    def whole(self) -> bool:
        return self.length == prod(self.shape)

    def label(self, name: str) -> str:
        return name if self.whole else f"{name}@{self.first}"


class Snapshot:
    """A copy of this rank's share in host memory; nothing of it changes when training goes on."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.facts: Facts = {}

    def add(self, name: str, piece: Piece, values: Tensor) -> None:
        """`values`: the piece's entries, flat."""
        copy = torch.empty(values.shape, dtype=values.dtype, device="cpu")
        copy.copy_(values.detach())
        self.tensors[piece.label(name)] = copy.view(piece.shape) if piece.whole else copy

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


class StateReader:
    """The state that the files of one checkpoint hold together; they have been verified before."""

    def __init__(self, paths: Sequence[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._files: list[Any] = []
        self.facts: list[Facts] = []
        """Of each rank that wrote, in their order."""
        self._places: dict[str, list[tuple[int, str, Any]]] = {}
        for path in sorted(paths):
            try:
                file = safe_open(path, framework="pt")
                self.facts.append(json.loads(file.metadata()["facts"]))
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path} holds no learner state: {error}") from error
            self._files.append(file)
            for key in file.keys():  # noqa: SIM118 (no mapping)
                name, cut, first = key.rpartition("@")
                name, first = (name, int(first)) if cut else (key, 0)
                self._places.setdefault(name, []).append((first, key, file))
        if not self.facts:
            raise CheckpointError("the checkpoint holds no learner state")

    def names(self, prefix: str) -> Iterator[str]:
        """What follows `prefix` in the names of its tensors."""
        return (name.removeprefix(prefix) for name in self._places if name.startswith(prefix))

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str, piece: Piece) -> Tensor:
        """A piece, flat, put together from those that were written; raises CheckpointError where one is missing."""
        if name not in self._places:
            raise CheckpointError(
                f"the checkpoint does not hold {name}: it belongs to another model or recipe"
            )
        parts, at, end = [], piece.first, piece.first + piece.length
        for first, key, file in sorted(self._places[name], key=lambda place: place[0]):
            written = file.get_slice(key)
            shape = tuple(written.get_shape())
            stop = min(first + prod(shape), end)
            if "@" not in key and shape != piece.shape:
                raise CheckpointError(
                    f"the checkpoint holds {name} with shape {shape}, the model has {piece.shape}"
                )
            if first <= at < stop:
                # Only flat pieces can be read in part.
                values = written if "@" in key else file.get_tensor(key).flatten()
                parts.append(values[at - first : stop - first])
                at = stop
        if at < end:
            raise CheckpointError(f"the checkpoint lacks entries {at} to {end - 1} of {name}")
        return parts[0] if len(parts) == 1 else torch.cat(parts)
