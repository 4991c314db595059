"""One DeepSpeed engine with what belongs to it: optimizer, clipping, sets of moments.

The policy has one, and so has the critic of an algorithm that trains one: both take the same configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor

from .config import LearnerConfig
from .errors import LearnerError
from .failpoints import reach
from .optimizer_states import MAIN, OptimizerStates
from .parameter_selection import UpdateMask

ModelName = Literal["policy", "critic"]


def deepspeed_config(config: LearnerConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration; batching, accumulation and schedules stay with plait."""
    zero: dict[str, Any] = {"stage": config.zero_stage, "overlap_comm": config.device == "cuda"}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Without ZeRO and in float32 DeepSpeed clips but does not tell the norm: see ModelEngine.apply.
        "gradient_clipping": 0.0 if clips_itself(config) else config.max_grad_norm,
        "steps_per_print": 10**9,
    }


def clips_itself(config: LearnerConfig) -> bool:
    return config.zero_stage == 0 and config.dtype == "float32"


class ModelEngine:
    """A trained module on this rank; calling it is the module's forward pass."""

    def __init__(self, module: torch.nn.Module, config: LearnerConfig, name: ModelName) -> None:
        """`name` is what a checkpoint calls it."""
        import deepspeed

        self.config = config
        self.name: ModelName = name
        self.deepspeed: Any = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(module, config),
            config=deepspeed_config(config),
            dist_init_required=False,
        )[0]
        self.moments = OptimizerStates(self.deepspeed)
        self.mask: UpdateMask | None = None
        """Which entries a step may change; its owner lets it choose before each `apply`. None: all."""

    @property
    def module(self) -> Any:
        return self.deepspeed.module

    def __call__(self, *args: Any) -> Any:
        return self.deepspeed(*args)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of one micro-batch, summed over ranks; `last`: none follows before the optimizer step."""
        reach("learner.backward")
        self.deepspeed.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks, but denominators already count all of them.
        scaled = loss * torch.distributed.get_world_size()
        self.deepspeed.backward(scaled, scale_wrt_gas=False)

    def apply(self, learning_rate: float, optimizer: str = MAIN) -> float:
        """Optimizer step with the AdamW moments of that name; returns the gradient norm before clipping.

        Where that is not finite (on every rank then: the norm is that of all ranks) the gradients are dropped, and no
        weight and no moment changes. Under ZeRO DeepSpeed itself leaves such a step out.
        """
        engine = self.deepspeed
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = None
        if clips_itself(self.config):
            norm = torch.nn.utils.clip_grad_norm_(
                self.module.parameters(), self.config.max_grad_norm
            )
        usable = norm is None or isfinite(norm)
        with self.moments.use(optimizer) if usable else self.moments.unmoved():
            engine.step()
        if norm is None:
            norm = engine.get_global_grad_norm()
        if norm is None:
            raise LearnerError("DeepSpeed reported no gradient norm; its version is not supported")
        return float(norm)

    def discard(self) -> float:
        """Drop the accumulated gradients: no weight and no moment changes; returns their norm."""
        with self.moments.unmoved():
            return self.apply(0.0)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, what was accumulated at full size) of each trained parameter that the loss reached.

        Collective under ZeRO: every rank walks it. Without ZeRO it is the buffer itself, not a copy.
        """
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self.module.named_parameters():
            gradient = safe_get_full_grad(parameter) if parameter.requires_grad else None
            if gradient is not None:
                yield name, gradient

    def gradient_share(self) -> dict[str, Tensor]:
        """This rank's part of the accumulated gradient: 1 / ranks of each parameter, float32 in host memory."""
        rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return {
            name: gradient.flatten()
            .tensor_split(num_ranks)[rank]
            .to("cpu", torch.float32, copy=True)
            for name, gradient in self.gradients()
        }


def make_optimizer(module: torch.nn.Module, config: LearnerConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.adam_epsilon,
    }
    if config.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, fused=True, **options)
