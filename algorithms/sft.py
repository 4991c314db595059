"""Supervised fine-tuning: the plain baseline, and the expert half of every hybrid.

Objective: expert loss over EXPERT tokens - entropy_coef x entropy of EXPERT tokens.

Only expert rows; each step trains the demonstrations of its prompts, or what `data_selection` leaves of them. Departs
from common trainers in one point: the mean is over all tokens of the minibatch (or its rows), not a mean of micro-batch
means, so results do not depend on packing or accumulation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator

from ..engine.contracts import LossFn, Need
from ..engine.ledger import ExpertLedger
from ..engine.types import (
    LossOutput,
    PolicyOutput,
    Prompt,
    RolloutGroup,
    Sample,
    StepPlan,
    TrainBatch,
    Update,
)
from .base import AlgorithmBase, AlgorithmConfig, Setup
from .data_selection import DataSelection, Selection, SelfResponse
from .expert_losses import ExpertLoss, Nll
from .losses import Members, Normalizer, entropy_component, expert_component
from .step_size import StepSize


class SupervisedFields(AlgorithmConfig):
    """Fields of methods whose rows are all EXPERT rows that stand alone."""

    standalone_experts = True
    expert_loss: ExpertLoss = Nll()
    normalizer: Normalizer = "tokens"
    """Of the expert component."""
    entropy_coef: float = Field(default=0.0, ge=0)


class SftConfig(SupervisedFields):
    type: Literal["sft"] = "sft"
    data_selection: DataSelection | None = None
    """Which of a step's demonstrations train (docs/expert-losses.md); null: all."""

    @model_validator(mode="after")
    def _compared_rows_are_not_selected(self) -> SftConfig:
        if self.data_selection is not None and "pairs" in self.expert_loss.needs:
            raise ValueError(
                f"algorithm.expert_loss.type = {self.expert_loss.type!r} compares responses, and data_selection "
                "would drop some of them; leave one of the two out"
            )
        return self


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

    def __init__(self, config: SupervisedFields, setup: Setup) -> None:
        super().__init__(config, setup)
        rule = getattr(config, "data_selection", None)
        self.selection = None if rule is None else Selection(rule)
        self.trains_own_responses = isinstance(rule, SelfResponse)

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {"main": partial(sft_loss, config=self.config)}

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        needs: set[Need] = {"demonstrations"}
        if self.config.entropy_coef > 0:
            needs.add("entropy")
        if self.selection is not None:
            needs |= self.selection.rule.needs
        return {"main": frozenset(needs) | self.config.expert_loss.needs}

    def plan(self, prompts: Sequence[Prompt], experts: Sequence[Prompt], step: int) -> StepPlan:
        if self.selection is None:
            return StepPlan(experts=tuple(prompts))
        return StepPlan(self.selection.requests(prompts, self.setup.sampling), tuple(prompts))

    def assemble(
        self, plan: StepPlan, groups: Sequence[RolloutGroup], step: int
    ) -> Sequence[Update]:
        rows = self.demonstration_rows(plan.experts)
        if self.selection is not None:
            rows = self.selection.rows(rows, groups)
        rows = self.alone(rows, plan.experts, step)
        return [self.update(rows, self.coefs(step))]

    def credit(self, samples: Sequence[Sample]) -> list[Sample]:
        return list(samples)

    def finish(self, batch: TrainBatch) -> TrainBatch:
        return batch if self.selection is None else self.selection.finish(batch)

    def ledger(self, updates: Sequence[Update], step: int) -> ExpertLedger:
        known = super().ledger(updates, step)
        return known if self.selection is None else replace(known, dropped=self.selection.dropped)

    def step_size(self, num_prompts: int, step: int) -> StepSize:
        """One demonstration a prompt, and the rollouts that a selection rule looks at."""
        num = 0 if self.selection is None else self.selection.rule.num_rollouts
        rows = num_prompts * self.rows_per_expert
        return StepSize(num_prompts * num, int(num > 0), rows, (self.phase(rows),))

    def metrics(self) -> Mapping[str, float]:
        known = super().metrics()
        return known if self.selection is None else {**known, **self.selection.metrics}

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state if self.selection is None else {**state, "selection": self.selection.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.selection is not None:
            self.selection.state = dict(state["selection"])
