"""Where this rank's float32 master weights live inside DeepSpeed, and which entries of which parameter they hold.

Without ZeRO the optimizer sees the parameters themselves. Under ZeRO it sees flat tensors: each is this rank's part of
several parameters laid end to end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """Entries `first:first + length` of a flattened parameter are entries `at:at + length` of a flat master weight."""

    name: str
    master: Tensor
    at: int
    first: int
    length: int


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


def trained_parameters(engine: Any) -> Iterator[tuple[str, Any]]:
    """(Hugging Face name, parameter) of all that the optimizer has."""
    for name, parameter in engine.module.model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def full_shape(parameter: Any) -> tuple[int, ...]:
    """ZeRO-3 leaves an empty tensor where a parameter was and keeps its shape beside."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def fragments(engine: Any, rank: int) -> Iterator[Fragment]:
    """Every piece of a trained parameter that this rank's master weights hold."""
    masters = master_weights(engine)
    for name, parameter in trained_parameters(engine):
        size = prod(full_shape(parameter))
        if hasattr(
            parameter, "ds_id"
        ):  # ZeRO-3: each parameter is cut evenly, the last part padded
            optimizer = engine.optimizer
            group, at, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
            length = min(part, size - rank * part)
            if length > 0:
                yield Fragment(name, masters[group], at, rank * part, length)
        elif hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2: the flat group is cut, anywhere
            held = parameter._hp_mapping
            if held is not None:
                here, there = held.hp_fragment_address, held.lp_fragment_address
                master = masters[held.param_group_index]
                yield Fragment(name, master, here.start, there.start, here.numel)
        else:
            yield Fragment(name, parameter, 0, 0, size)
