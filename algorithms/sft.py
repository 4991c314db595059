"""Supervised fine-tuning: the plain baseline, and the expert half of every hybrid.

Objective: expert loss over EXPERT tokens - entropy_coef x entropy of EXPERT tokens.

Only expert rows; each step trains the demonstrations of its prompts. Departs from common trainers in one point: the
mean is over all tokens of the minibatch (or its rows), not a mean of micro-batch means, so results do not depend on
packing or accumulation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from pydantic import Field

from ..engine.contracts import LossFn, Need
from ..engine.types import LossOutput, PolicyOutput, Prompt, Sample, StepPlan, TrainBatch
from .base import AlgorithmBase, AlgorithmConfig
from .expert_losses import ExpertLoss, Nll
from .losses import Members, Normalizer, entropy_component, expert_component


class SupervisedFields(AlgorithmConfig):
    """Fields of methods whose rows are all EXPERT rows that stand alone."""

    standalone_experts = True
    expert_loss: ExpertLoss = Nll()
    normalizer: Normalizer = "tokens"
    """Of the expert component."""
    entropy_coef: float = Field(default=0.0, ge=0)


class SftConfig(SupervisedFields):
    type: Literal["sft"] = "sft"


def sft_loss(
    out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float], *, config: SupervisedFields
) -> LossOutput:
    """Expert loss minus an entropy bonus; out.logprobs and out.entropy are [T]."""
    expert, expert_metrics = expert_component(
        out, batch, config.expert_loss, config.normalizer, config.max_response_length, coefs
    )
    entropy, entropy_metrics = entropy_component(
        out, batch, config.entropy_coef, Members.expert(batch)
    )
    return LossOutput(expert + entropy, {**expert_metrics, **entropy_metrics})


class Sft(AlgorithmBase):
    Config = SftConfig
    every_prompt_demonstrated = True

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {"main": partial(sft_loss, config=self.config)}

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        needs: set[Need] = {"demonstrations"}
        if self.config.entropy_coef > 0:
            needs.add("entropy")
        return {"main": frozenset(needs) | self.config.expert_loss.needs}

    def plan(self, prompts: Sequence[Prompt], experts: Sequence[Prompt], step: int) -> StepPlan:
        return StepPlan(experts=tuple(prompts))

    def credit(self, samples: Sequence[Sample]) -> list[Sample]:
        return list(samples)
