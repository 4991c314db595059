"""The critic: what the policy will earn from each state on, learned beside it.

A transformer of its own, loaded from the policy's checkpoint, with a linear head in place of the LM head. With
adapters (`learner.parameter_selection: {type: lora}`) its body trains adapters too, and the head in full; every other
selection is the policy's alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .attention import hidden_states
from .config import LearnerConfig
from .types import Source, TrainBatch


class ValueHead(nn.Linear):
    """hidden -> 1, computed in float32; zero at first, so that initial values are 0."""

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        super().__init__(hidden, 1, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """[n, hidden] -> [n]."""
        values = nn.functional.linear(input.float(), self.weight.float(), self.bias.float())
        return values.squeeze(-1)


class CriticModel(nn.Module):
    """Values of packed rows."""

    def __init__(self, body: Any, *, packing: bool) -> None:
        super().__init__()
        self.body = body
        self.packing = packing
        self.value_head = ValueHead(body.config.hidden_size, body.dtype)

    def forward(self, batch: TrainBatch) -> Tensor:
        """float32 [T]: value of the state before each token that is not CONTEXT, 0 on CONTEXT.

        Tokens of weight 0 have values too: returns of the tokens before them depend on those.
        """
        valued = (batch.source != Source.CONTEXT) & (batch.position_ids > 0)
        targets = valued.nonzero().squeeze(-1)
        if len(targets) == 0:
            targets = torch.ones(1, dtype=torch.long, device=batch.input_ids.device)
        hidden = hidden_states(self.body, batch, targets - 1, packing=self.packing)
        values = self.value_head(hidden)
        return values.new_zeros(batch.num_tokens).index_copy(0, targets, values)


def load_critic(path: str, config: LearnerConfig) -> CriticModel:
    """The body of the causal LM at `path`, in training mode, with a fresh head."""
    from .model import load_model

    if config.adapters is None:
        config = config.model_copy(update={"parameter_selection": None})
    model: Any = load_model(path, config)
    return CriticModel(model.base_model.train(), packing=config.packing)
