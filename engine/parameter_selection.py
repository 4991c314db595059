"""Which parameters an optimizer step may change: the rules, and the mask that holds them to it.

A frozen entry does not move by a bit. Its gradient is set to 0 just before the torch optimizer's step, so its moments
decay as if it had none, and its master weight is put back just after, so neither momentum nor weight decay reaches it.
Both happen inside DeepSpeed's step, before the master weights are copied to the model and gathered.

Whole parameters that `pattern` freezes have no gradient and no master weight; `lora` is an adapter (model.py).
Rules see full tensors, the same on every rank; each rank keeps the mask of its own master weights only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from math import floor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .batch import seed_of
from .config import (
    GradientMagnitudeConfig,
    HalfConfig,
    LearnerConfig,
    PatternConfig,
    PrincipalWeightsConfig,
)
from .errors import ConfigError
from .master_weights import (
    Fragment,
    fragments,
    full_shape,
    inner_optimizer,
    master_weights,
    trained_parameters,
)

FIELD = "learner.parameter_selection"
ROWS_AT_ONCE = 8192
Masking = HalfConfig | GradientMagnitudeConfig | PrincipalWeightsConfig | PatternConfig


# -- rules ----------------------------------------------------------------------------------------


def frozen_half(shapes: Mapping[str, tuple[int, ...]], fraction: float, seed: int) -> set[str]:
    """Names of a random `fraction` of the tensors, drawn among the matrices and among the vectors of each block.

    A block is a numbered layer, or everything outside the layers. Where fraction x n is no whole number, a draw rounds.
    """
    groups: dict[tuple[str, bool], list[str]] = {}
    for name, shape in shapes.items():
        number = re.search(r"\.(\d+)\.", name)
        groups.setdefault((number[1] if number else "", len(shape) > 1), []).append(name)
    rng = np.random.default_rng(seed)
    frozen = set[str]()
    for names in groups.values():
        count = floor(fraction * len(names) + rng.random())
        frozen |= {names[i] for i in rng.permutation(len(names))[:count]}
    return frozen


def largest_entries(values: Tensor, keep_fraction: float) -> Tensor:
    """bool: at least as large as the floor(keep_fraction n)-th largest magnitude (one at least), and not 0."""
    sizes = values.abs()
    count = max(1, floor(keep_fraction * sizes.numel() + 1e-9))
    kth = sizes.flatten().kthvalue(sizes.numel() - count + 1).values
    return (sizes >= kth) & (sizes > 0)


def low_rank(weight: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank: weight [m, n] projected on its first right singular vectors."""
    if weight.shape[0] < weight.shape[1]:
        return low_rank(weight.T, rank).T
    size = weight.shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
    for rows in weight.split(ROWS_AT_ONCE):
        gram += rows.double().T @ rows.double()
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    return weight @ (vectors @ vectors.T).to(weight.dtype)


def matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern)


def freeze_unmatched(model: nn.Module, config: PatternConfig) -> None:
    """Take the gradient from every parameter that no pattern names; before the optimizer is made.

    Raises ConfigError for a pattern without a parameter, and for a row number that its parameter does not have.
    """
    parameters = dict(model.named_parameters())
    for pattern in [*config.trainable, *config.neurons]:
        if not any(matches(name, pattern) for name in parameters):
            some = ", ".join(list(parameters)[:3])
            raise ConfigError.at(f"{FIELD}.pattern", pattern, f"no parameter has it; some: {some}")
    for pattern, rows in config.neurons.items():
        for name in (name for name in parameters if matches(name, pattern)):
            count = len(parameters[name])
            if not rows or min(rows) < 0 or max(rows) >= count:
                message = f"{name} has rows 0 to {count - 1}"
                raise ConfigError.at(f"{FIELD}.neurons.{pattern}", rows, message)
    for name, parameter in parameters.items():
        named = any(matches(name, pattern) for pattern in [*config.trainable, *config.neurons])
        parameter.requires_grad_(named)


def trained_rows(name: str, shape: tuple[int, ...], config: PatternConfig) -> Tensor:
    """bool [shape]: all where `trainable` has the name, else the rows of `neurons`."""
    whole = any(matches(name, pattern) for pattern in config.trainable)
    mask = torch.full(shape, whole)
    for pattern, rows in config.neurons.items():
        if matches(name, pattern):
            mask[rows] = True
    return mask


# -- the mask ---------------------------------------------------------------------------------------


def make_mask(engine: Any, config: LearnerConfig, seed: int) -> UpdateMask | None:
    """None where no entry of a trained parameter is ever frozen."""
    chosen = config.parameter_selection
    if not config.masks_updates or not isinstance(chosen, Masking):
        return None
    return UpdateMask(engine, chosen, seed)


class UpdateMask:
    """Holds the mask of this rank's master weights and applies it around every step of the torch optimizer."""

    def __init__(self, engine: Any, config: Masking, seed: int) -> None:
        self._engine, self._config, self._seed = engine, config, seed
        self._rank = torch.distributed.get_rank()
        self.steps = 0
        """Optimizer steps so far."""
        self._share = 1.0
        self._trained: dict[Tensor, Tensor] = {}
        self._before: dict[Tensor, Tensor] = {}
        optimizer = inner_optimizer(engine)
        optimizer.register_step_pre_hook(self._remember)
        optimizer.register_step_post_hook(self._put_back)

    def select(self) -> float:
        """Choose the entries of the coming optimizer step, after its backward pass; returns their share of all.

        Collective: all ranks call it together.
        """
        if self._is_due():
            self._choose()
        self.steps += 1
        return self._share

    def retract(self) -> None:
        """The optimizer step that `select` chose for was left out."""
        self.steps -= 1

    def _is_due(self) -> bool:
        if not self._trained:
            return True
        match self._config:
            case HalfConfig(redraw_steps=every) | PrincipalWeightsConfig(refresh_steps=every):
                return self.steps % every == 0
            case GradientMagnitudeConfig():
                return True
            case PatternConfig():
                return False

    def _choose(self) -> None:
        parts: dict[str, list[Fragment]] = {}
        for part in fragments(self._engine, self._rank):
            parts.setdefault(part.name, []).append(part)
        masters = master_weights(self._engine)
        self._trained = {weight: torch.zeros_like(weight, dtype=torch.bool) for weight in masters}
        frozen, kept, total = self._frozen_names(), 0, 0
        for name, parameter in trained_parameters(self._engine):
            mask = self._mask(name, parameter, frozen).flatten()
            kept, total = kept + int(mask.sum()), total + len(mask)
            for part in parts.get(name, []):
                first = part.piece.first
                part.of(self._trained[part.master]).copy_(mask[first : first + part.piece.length])
        self._share = kept / total

    def _frozen_names(self) -> set[str]:
        """What `half` draws; the same after a restart, because only seed and step decide."""
        if not isinstance(self._config, HalfConfig):
            return set()
        shapes = {name: full_shape(p) for name, p in trained_parameters(self._engine)}
        draw = self.steps // self._config.redraw_steps
        return frozen_half(shapes, self._config.fraction, seed_of(self._seed, "half", draw))

    def _mask(self, name: str, parameter: Any, frozen: set[str]) -> Tensor:
        """bool, in the parameter's full shape: what may change. Collective where it looks at weights or gradients."""
        shape = full_shape(parameter)
        match self._config:
            case HalfConfig():
                return torch.full(shape, name not in frozen)
            case GradientMagnitudeConfig(keep_fraction=keep):
                return largest_entries(full_gradient(parameter), keep)
            case PrincipalWeightsConfig(rank=rank, keep_fraction=keep):
                if len(shape) != 2:
                    return torch.zeros(shape, dtype=torch.bool)
                return largest_entries(low_rank(full_master(parameter), rank), keep)
            case PatternConfig():
                return trained_rows(name, shape, self._config)

    @torch.no_grad()
    def _remember(self, optimizer: Any, *_: Any) -> None:
        for weight in stepped(optimizer) if self._trained else ():
            assert weight.grad is not None
            weight.grad.masked_fill_(~self._trained[weight], 0.0)
            self._before[weight] = weight.detach().clone()

    @torch.no_grad()
    def _put_back(self, *_: Any) -> None:
        for weight, before in self._before.items():
            weight.copy_(torch.where(self._trained[weight], weight, before))
        self._before.clear()

    @property
    def column(self) -> dict[Tensor, Tensor]:
        """What a checkpoint must hold, by master weight: `principal_weights` cannot find its mask again, because the
        weights it came from are gone."""
        return self._trained if isinstance(self._config, PrincipalWeightsConfig) else {}

    def facts(self) -> dict[str, Any]:
        return {"steps": self.steps, "share": self._share}

    def restore(self, facts: Mapping[str, Any], masks: dict[Tensor, Tensor]) -> None:
        self.steps, self._share = facts["steps"], facts["share"]
        self._trained = masks


def stepped(optimizer: Any) -> list[Tensor]:
    """Master weights that this call of the optimizer changes."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def full_gradient(parameter: Any) -> Tensor:
    from deepspeed.utils import safe_get_full_grad

    gradient = safe_get_full_grad(parameter)
    assert gradient is not None, "called before the backward pass"
    return gradient


def full_master(parameter: Any) -> Tensor:
    """The float32 weights, gathered from all ranks; without ZeRO the parameter is its own master."""
    from deepspeed.utils import safe_get_full_fp32_param

    gathered = safe_get_full_fp32_param(parameter)
    return parameter.detach() if gathered is None else gathered
