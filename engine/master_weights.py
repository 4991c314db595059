"""Where this rank's float32 master weights live inside DeepSpeed, and which entries of which parameter they hold.

Without ZeRO the optimizer sees the parameters themselves. Under ZeRO it sees flat tensors: each is this rank's part of
several parameters laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from .learner_state import Piece


@dataclass(frozen=True)
class Fragment:
    """A piece of a parameter: entries `at:at + piece.length` of a flat master weight."""

    name: str
    master: Tensor
    at: int
    piece: Piece
    replicated: bool = False
    """Every rank holds the same."""

    def of(self, column: Tensor) -> Tensor:
        """The fragment's entries, flat, of something as large as the master weight."""
        return column.detach().view(-1)[self.at : self.at + self.piece.length]


def inner_optimizer(engine: Any) -> Any:
    """The torch optimizer, which DeepSpeed wraps under ZeRO and for bfloat16."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def master_weights(engine: Any) -> list[Tensor]:
    """This rank's parameters as its torch optimizer sees them, in a fixed order."""
    # ZeRO-3 steps sub-groups of parameters one by one and empties the param_groups in between.
    groups = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    if groups is not None:
        return list(groups)
    return [p for group in inner_optimizer(engine).param_groups for p in group["params"]]


def named_parameters(engine: Any) -> Iterator[tuple[str, Any]]:
    """By the names of the Hugging Face model; a critic's by its own."""
    yield from getattr(engine.module, "model", engine.module).named_parameters()


def trained_parameters(engine: Any) -> Iterator[tuple[str, Any]]:
    """(name, parameter) of all that the optimizer has."""
    return ((name, p) for name, p in named_parameters(engine) if p.requires_grad)


def full_shape(parameter: Any) -> tuple[int, ...]:
    """ZeRO-3 leaves an empty tensor where a parameter was and keeps its shape beside."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def local_part(parameter: Any, rank: int) -> tuple[Tensor, Piece] | None:
    """This rank's part of a parameter as the forward pass uses it; None where ZeRO-3 gives it none."""
    shape = full_shape(parameter)
    size = prod(shape)
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().view(-1), Piece(shape, 0, size)
    part = parameter.ds_tensor.numel()  # each parameter is cut evenly, the last part padded
    length = min(part, size - rank * part)
    if length <= 0:
        return None
    return parameter.ds_tensor.detach()[:length], Piece(shape, rank * part, length)


def fragments(engine: Any, rank: int) -> Iterator[Fragment]:
    """Every piece of a trained parameter that this rank's master weights hold."""
    masters = master_weights(engine)
    for name, parameter in trained_parameters(engine):
        shape = full_shape(parameter)
        if hasattr(parameter, "ds_id"):
            optimizer = engine.optimizer
            group, at, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
            length = min(part, prod(shape) - rank * part)
            if length > 0:
                yield Fragment(name, masters[group], at, Piece(shape, rank * part, length))
        elif hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2: the flat group is cut, anywhere
            held = parameter._hp_mapping
            if held is not None:
                here, there = held.hp_fragment_address, held.lp_fragment_address
                master = masters[held.param_group_index]
                yield Fragment(name, master, here.start, Piece(shape, there.start, here.numel))
        else:
            yield Fragment(name, parameter, 0, Piece(shape, 0, prod(shape)), replicated=True)


def write_parameter(parameter: Any, rank: int, read: Callable[[Piece], Tensor]) -> None:
    """Give the forward pass new weights; `read` returns a piece of them, flat."""
    part = local_part(parameter, rank)
    if part is not None:
        values, piece = part
        values.copy_(read(piece))
    shape = full_shape(parameter)
    if hasattr(parameter, "ds_id") and parameter.data.shape == shape:
        # ZeRO-3 keeps small parameters whole on every rank, beside the parts.
        parameter.data.copy_(read(Piece(shape, 0, prod(shape))).view(shape))
