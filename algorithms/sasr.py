"""SASR: each step is fine-tuning or GRPO, drawn with a probability that follows the gradient norm (arXiv 2505.13026).

Objective: `sft`: expert loss on the demonstrations of the step's prompts. `main`: grpo with KL to the frozen reference
on their rollouts. One or the other each step, never a mixture; one optimizer.

The first `warmup_steps` steps are `sft`. Then, with p = last / (last + gate_scale x warmup): a draw below p is `sft`.
`warmup` is the gradient norm of the last warm-up step, `last` that of the last `sft` step. While demonstrations still
move the policy as they did in the warm-up, half of the steps imitate; the better it fits them, the more steps are RL.
The reference is the policy at the end of the warm-up (our choice).

Departs from the paper: `sft` is a token mean (there a sum), the same in warm-up and later, because the gate compares
norms; the split of tokens at the median advantage is left out, since its effect is not specified and it empties a set
under binary rewards; the KL signal of the abstract is not in the gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from pydantic import Field

from ..engine.contracts import LossFn, Need
from ..engine.ledger import ExpertLedger
from ..engine.types import (
    LossOutput,
    PolicyOutput,
    Prompt,
    RolloutGroup,
    Source,
    StepPlan,
    TrainBatch,
    Update,
    UpdateReport,
)
from .base import AlgorithmBase, ExpertFields, PolicyFields, Setup, surrogate_needs, surrogate_only
from .draws import uniforms
from .grpo import grpo_loss
from .losses import Normalizer, expert_component
from .step_size import StepSize

MIN_NORM = 1e-8


class SasrConfig(PolicyFields, ExpertFields):
    standalone_experts = True
    type: Literal["sasr"] = "sasr"
    warmup_steps: int = Field(default=100, ge=1)
    """Fine-tuning steps before the gate decides."""
    gate_scale: float = Field(default=1.0, ge=0)
    """Weight of the warm-up's norm in the gate (gamma in the paper); larger means fewer `sft` steps."""
    normalizer: Normalizer = "rows"
    kl_coef: float = Field(default=0.04, ge=0)


def sasr_sft_loss(
    out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float], *, config: SasrConfig
) -> LossOutput:
    expert, metrics = expert_component(
        out, batch, config.expert_loss, config.expert_normalizer, config.max_response_length, coefs
    )
    return LossOutput(expert, metrics)


class Sasr(AlgorithmBase):
    Config = SasrConfig
    every_prompt_demonstrated = True

    def __init__(self, config: SasrConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.warmup_norm: float | None = None
        self.last_norm: float | None = None
        self.num_sft = self.num_rl = 0
        self.sft_probability = 1.0
        self._step = 0
        self._norms: list[float] = []  # of this step's minibatches

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {
            "main": partial(grpo_loss, config=self.config),
            "sft": partial(sasr_sft_loss, config=self.config),
        }

    @property
    def advantage_only(self) -> Mapping[str, frozenset[Source]]:
        return surrogate_only(self.config, Source.POLICY)

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        sft = self.config.expert_loss.needs | {"demonstrations"}
        return {"main": surrogate_needs(self.config, expert=False), "sft": sft}

    def plan(self, prompts: Sequence[Prompt], experts: Sequence[Prompt], step: int) -> StepPlan:
        if self.choose(step, partial(self.draw, step)) == "sft":
            return StepPlan(experts=tuple(prompts))
        return StepPlan(tuple(self.request(prompt) for prompt in prompts))

    def draw(self, step: int) -> float:
        return uniforms(1, self.setup.seed, "sasr", step)[0]

    def choose(self, step: int, draw: Any) -> Literal["sft", "rl"]:
        """Open a step: its kind, from `draw()`, which is only called after the warm-up."""
        self._step, self._norms = step, []
        self.sft_probability = 1.0 if step < self.config.warmup_steps else self.gate()
        sft = step < self.config.warmup_steps or draw() < self.sft_probability
        self.num_sft, self.num_rl = self.num_sft + sft, self.num_rl + (not sft)
        return "sft" if sft else "rl"

    def gate(self) -> float:
        """Probability of `sft`; 1 as long as no `sft` step has been measured."""
        if self.last_norm is None or self.warmup_norm is None:
            return 1.0
        total = self.last_norm + self.config.gate_scale * self.warmup_norm
        return self.last_norm / max(total, MIN_NORM)

    def assemble(
        self, plan: StepPlan, groups: Sequence[RolloutGroup], step: int
    ) -> Sequence[Update]:
        minibatches, epochs = self.setup.minibatches, self.setup.epochs
        moves = self.config.kl_coef > 0 and step == self.config.warmup_steps
        if plan.experts:
            rows = self.alone(self.demonstration_rows(plan.experts), plan.experts, step)
            sft = tuple(rows), "sft", self.coefs(step), minibatches, epochs
            return [Update(*sft, refresh_reference=moves)]
        (update,) = super().assemble(plan, groups, step)
        rl = update.samples, "main", update.coefs, minibatches, epochs
        return [Update(*rl, refresh_reference=moves)]

    def observe(self, report: UpdateReport) -> None:
        """Norms of `sft` steps only: the mean over the step's minibatches."""
        if report.loss_name != "sft":
            return
        self._norms.append(report.grad_norm)
        self.last_norm = sum(self._norms) / len(self._norms)
        if self._step == self.config.warmup_steps - 1:
            self.warmup_norm = self.last_norm

    def step_size(self, num_prompts: int, step: int) -> StepSize:
        """Demonstrations in the warm-up; after it the larger of the two kinds of step, RL."""
        if step < self.config.warmup_steps:
            rows = num_prompts * self.rows_per_expert
            return StepSize(0, 0, rows, (self.phase(rows, "sft"),))
        return super().step_size(num_prompts, step)

    def metrics(self) -> Mapping[str, float]:
        metrics = {**super().metrics(), "sft_probability": self.sft_probability}
        if self.num_sft + self.num_rl:
            metrics["sft_share"] = self.num_sft / (self.num_sft + self.num_rl)
        known = {"warmup_norm": self.warmup_norm, "last_norm": self.last_norm}
        return metrics | {name: value for name, value in known.items() if value is not None}

    def ledger(self, updates: Sequence[Update], step: int) -> ExpertLedger:
        """Gate: 1 where this step is fine-tuning, 0 where it is RL."""
        sft = any(update.loss == "sft" for update in updates)
        return ExpertLedger(gate_rate=float(sft) if updates else None)

    def state_dict(self) -> dict[str, Any]:
        return {
            "warmup_norm": self.warmup_norm,
            "last_norm": self.last_norm,
            "num_sft": self.num_sft,
            "num_rl": self.num_rl,
            **super().state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.warmup_norm, self.last_norm = state["warmup_norm"], state["last_norm"]
        self.num_sft, self.num_rl = state["num_sft"], state["num_rl"]
        super().load_state_dict(state)
