"""One model engine's part of the learner's state: its weights, its sets of moments and its mask of updates.

Restored at any ZeRO stage and by any number of ranks: a rank reads the entries that its own master weights hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError
from .learner_state import Facts, Piece, Snapshot, StateReader
from .master_weights import (
    Fragment,
    fragments,
    local_part,
    master_weights,
    named_parameters,
    write_parameter,
)
from .parameter_selection import FIELD

if TYPE_CHECKING:
    from .model_engine import ModelEngine

Columns = dict[str, Mapping[Tensor, Tensor]]
REFERENCE = "reference"
ADAPTER = ".lora_"
"""In the names of parameters that no model file holds: a frozen one of them is saved too."""


@torch.no_grad()
def add_model(snapshot: Snapshot, engine: ModelEngine) -> None:
    """This rank's pieces of every column, and how many steps each set of moments has made."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    held = [
        fragment
        for i, fragment in enumerate(fragments(engine.deepspeed, rank))
        if not fragment.replicated or i % num_ranks == rank
    ]
    for column, values in columns_of(engine).items():
        for fragment in held:
            if fragment.master in values:
                name = f"{engine.name}/{column}/{fragment.name}"
                snapshot.add(name, fragment.piece, fragment.of(values[fragment.master]))
    for i, (name, parameter) in enumerate(frozen_adapters(engine)):
        part = local_part(parameter, rank)
        if part is not None and (hasattr(parameter, "ds_id") or i % num_ranks == rank):
            snapshot.add(f"{engine.name}/frozen/{name}", part[1], part[0])
    facts: Facts = {"steps": {}}
    for set_name, states in engine.moments.sets().items():
        facts["steps"][set_name] = {
            fragment.name: float(states[fragment.master]["step"])
            for fragment in held
            if states.get(fragment.master)
        }
    if engine.mask is not None:
        facts["mask"] = engine.mask.facts()
    snapshot.facts[engine.name] = facts


def columns_of(engine: ModelEngine) -> Columns:
    """Name -> master weight -> values of its entries."""
    columns: Columns = {"master": {m: m for m in master_weights(engine.deepspeed)}}
    for set_name, states in engine.moments.sets().items():
        for master, state in states.items():
            for key, values in state.items():
                if isinstance(values, Tensor) and values.shape == master.shape and key != "step":
                    column: Any = columns.setdefault(f"{set_name}.{key}", {})
                    column[master] = values
    if engine.mask is not None and engine.mask.column:
        columns["mask"] = engine.mask.column
    return columns


def frozen_adapters(engine: ModelEngine) -> Iterator[tuple[str, Any]]:
    for name, parameter in named_parameters(engine.deepspeed):
        if ADAPTER in name and not parameter.requires_grad:
            yield name, parameter


@torch.no_grad()
def restore_model(reader: StateReader, engine: ModelEngine) -> None:
    """Raises CheckpointError where the state is that of another model or parameter selection."""
    found = [facts[engine.name] for facts in reader.facts if engine.name in facts]
    if not found:
        raise CheckpointError(f"the checkpoint holds no state of the {engine.name}")
    rank = torch.distributed.get_rank()
    held = list(fragments(engine.deepspeed, rank))
    for fragment in held:
        values = reader.read(f"{engine.name}/master/{fragment.name}", fragment.piece)
        fragment.of(fragment.master).copy_(values)
    engine.moments.restore(read_moments(reader, engine.name, held, found))
    if engine.mask is not None:
        restore_mask(reader, engine, held, found)
    frozen = dict(frozen_adapters(engine))
    for name, parameter in named_parameters(engine.deepspeed):
        if parameter.requires_grad or name in frozen:
            column = f"{engine.name}/{'frozen' if name in frozen else 'master'}/{name}"
            write_parameter(
                parameter, rank, lambda piece, column=column: reader.read(column, piece)
            )


def read_moments(
    reader: StateReader, model: str, held: list[Fragment], found: list[Facts]
) -> dict[str, dict[Tensor, dict[str, Any]]]:
    """Every set, by master weight; one without a step stays empty."""
    sets: dict[str, dict[Tensor, dict[str, Any]]] = {}
    names = dict.fromkeys(name for facts in found for name in facts["steps"])
    for set_name in names:
        steps = {k: n for facts in found for k, n in facts["steps"][set_name].items()}
        prefix = f"{model}/{set_name}."
        keys = sorted({name.partition("/")[0] for name in reader.names(prefix)})
        states = sets.setdefault(set_name, {})
        for fragment in held:
            if fragment.name not in steps:
                continue
            state = states.setdefault(fragment.master, {"step": steps[fragment.name]})
            if state["step"] != steps[fragment.name]:
                raise CheckpointError(
                    f"{model}: parameters made different numbers of steps with the moments {set_name!r}, which this "
                    "learner.zero_stage counts together; resume with the stage that wrote the checkpoint"
                )
            for key in keys:
                if key not in state:  # one tensor for all fragments of a master weight
                    state[key] = torch.zeros_like(fragment.master)
                name = f"{prefix}{key}/{fragment.name}"
                fragment.of(state[key]).copy_(reader.read(name, fragment.piece))
    return sets


def restore_mask(
    reader: StateReader, engine: ModelEngine, held: list[Fragment], found: list[Facts]
) -> None:
    assert engine.mask is not None
    if "mask" not in found[0]:
        raise CheckpointError(f"the checkpoint was written without {FIELD}")
    masks: dict[Tensor, Tensor] = {}
    for fragment in held:
        name = f"{engine.name}/mask/{fragment.name}"
        if name in reader:
            if fragment.master not in masks:
                masks[fragment.master] = torch.zeros_like(fragment.master, dtype=torch.bool)
            fragment.of(masks[fragment.master]).copy_(reader.read(name, fragment.piece))
    engine.mask.restore(found[0]["mask"], masks)


def add_reference(snapshot: Snapshot, reference: nn.Module) -> None:
    """A moved reference, whole on every rank: each writes some of its parameters."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for i, (name, weight) in enumerate(reference.named_parameters()):
        if i % num_ranks == rank:
            piece = Piece(tuple(weight.shape), 0, weight.numel())
            snapshot.add(f"{REFERENCE}/{name}", piece, weight.detach().view(-1))


@torch.no_grad()
def restore_reference(reader: StateReader, reference: nn.Module) -> bool:
    """Returns whether it had moved from the model that the run began with."""
    if not any(reader.names(f"{REFERENCE}/")):
        return False
    for name, weight in reference.named_parameters():
        piece = Piece(tuple(weight.shape), 0, weight.numel())
        weight.view(-1).copy_(reader.read(f"{REFERENCE}/{name}", piece))
    return True
