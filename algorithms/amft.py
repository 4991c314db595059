"""AMFT: one weight between SFT and RL, moved by a controller (arXiv 2508.06944).

Objective: (1 - mu) x policy + mu x expert - entropy_coef x entropy + kl_coef x KL: chord's loss, on rollouts and
demonstrations of the same prompts. The first `warmup_steps` steps are demonstrations alone, with mu = 1. Then, after
each step:

    mu <- clip(mu + meta_learning_rate x m + entropy_learning_rate x (entropy_target - entropy), mu_min, mu_max)

m is 0 except every `meta_every` steps: with v the gradient of a validation loss (minus the expected reward on further
prompts, whose rollouts train nothing) and d that of the loss at mu = 1 less that at mu = 0, all at the weights before
the step, m is the cosine of v and d, or learning_rate x v.d (`raw`). It is positive where SFT lowers the validation
loss more. `entropy` is the mean over the step's optimizer steps of the policy's entropy on its rollouts.

`entropy_target` is the entropy of the policy as the warm-up leaves it, on its first rollouts (our choice: the warm-up
itself has no rollouts). Counting `meta_every` from the end of the warm-up, and the number of validation prompts, are
ours too.

Departs from the public code: its meta-gradient has the wrong sign and a vanishing scale; here the sign is the derived
one, and cosine is the default. No critic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any, Literal

from pydantic import Field, model_validator

from ..engine.contracts import DrawFn, LossFn, Need
from ..engine.ledger import ExpertLedger
from ..engine.probes import GradientComparison
from ..engine.types import (
    LossOutput,
    PolicyOutput,
    Prompt,
    RolloutGroup,
    RolloutRequest,
    Sample,
    StepPlan,
    TrainBatch,
    Update,
    UpdateReport,
)
from .base import AlgorithmBase, Setup, surrogate_needs
from .chord import chord_loss
from .hybrid import HybridFields
from .losses import Members, policy_component
from .rows import rollout_rows
from .step_size import StepSize

MIN_PRODUCT = 1e-12
MetaGradient = Literal["cosine", "raw"]


class AmftConfig(HybridFields):
    type: Literal["amft"] = "amft"
    mu_start: float = Field(default=0.5, ge=0, le=1)
    """Weight of the expert term after the warm-up (0.8 in the public configs)."""
    mu_min: float = Field(default=0.05, ge=0, le=1)
    mu_max: float = Field(default=0.95, ge=0, le=1)
    meta_learning_rate: float = Field(default=1e-4, ge=0)
    entropy_learning_rate: float = Field(default=5e-4, ge=0)
    meta_every: int = Field(default=20, ge=1)
    """Steps from one meta-gradient to the next; the first step after the warm-up has one."""
    meta_gradient: MetaGradient = "cosine"
    validation_prompts: int = Field(default=32, ge=1)
    """Prompts of the training stream that a meta-gradient rolls out and does not train."""
    warmup_steps: int = Field(default=50, ge=0)
    """Steps that train demonstrations alone."""
    entropy_coef: float = Field(default=0.01, ge=0)

    @model_validator(mode="after")
    def _mu_starts_in_its_range(self) -> AmftConfig:
        if not self.mu_min <= self.mu_start <= self.mu_max:
            raise ValueError(
                f"mu_start = {self.mu_start} is not between mu_min = {self.mu_min} and mu_max = {self.mu_max}"
            )
        return self


def amft_loss(
    out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float], *, config: AmftConfig
) -> LossOutput:
    """chord's loss; the controller reads the entropy of POLICY tokens also where the loss has no such term."""
    result = chord_loss(out, batch, coefs, config=config)
    policy = Members.policy(batch)
    if not policy.tokens or out.entropy is None:
        return result
    entropy = {"policy_entropy": policy.mean(out.entropy.detach())}
    return LossOutput(result.loss, {**result.metrics, **entropy})


def validation_loss(
    out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float], *, config: AmftConfig
) -> LossOutput:
    """The surrogate alone: at old = current its gradient is that of minus the expected reward."""
    return LossOutput(*policy_component(out, batch, config))


def meta_gradient(found: GradientComparison, learning_rate: float, kind: MetaGradient) -> float:
    """m from the dot products of "validation", "sft" and "rl"; d = sft - rl."""
    along = found.dot("validation", "sft") - found.dot("validation", "rl")
    if kind == "raw":
        return learning_rate * along
    squared = found.dot("sft", "sft") - 2 * found.dot("sft", "rl") + found.dot("rl", "rl")
    return along / max(found.norm("validation") * max(squared, 0.0) ** 0.5, MIN_PRODUCT)


def next_mu(mu: float, meta: float, entropy: float, target: float, config: AmftConfig) -> float:
    moved = mu + config.meta_learning_rate * meta
    moved += config.entropy_learning_rate * (target - entropy)
    return min(max(moved, config.mu_min), config.mu_max)


class Amft(AlgorithmBase):
    Config = AmftConfig

    def __init__(self, config: AmftConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.mu = config.mu_start
        self.entropy_target: float | None = None
        self.meta_gradient = 0.0
        self._validation: frozenset[str] = frozenset()  # prompts of this step that train nothing
        self._validation_rows: list[Sample] = []
        self._gradients: GradientComparison | None = None
        self._mu_before = self.mu  # this step
        self._entropies: list[float] = []  # of this step's minibatches

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {
            "main": partial(amft_loss, config=self.config),
            "validation": partial(validation_loss, config=self.config),
        }

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        main = surrogate_needs(self.config) | frozenset[Need]({"demonstrations", "entropy"})
        return {"main": main, "validation": frozenset[Need]({"old_logprobs"})}

    def coefs(self, step: int) -> dict[str, float]:
        return {"mu": self.mu, **super().coefs(step)}

    def plan(self, prompts: Sequence[Prompt], experts: Sequence[Prompt], step: int) -> StepPlan:
        """Rollouts and demonstrations of the same prompts; demonstrations alone in the warm-up."""
        self._validation = frozenset()
        demonstrated = tuple(prompt for prompt in prompts if prompt.demonstrations)
        if step < self.config.warmup_steps:
            return StepPlan(experts=demonstrated)
        return StepPlan(tuple(self.request(prompt) for prompt in prompts), demonstrated)

    def follow_up(
        self, rounds: Sequence[Sequence[RolloutGroup]], step: int, draw: DrawFn
    ) -> Sequence[RolloutRequest]:
        """A second round for the validation gradient, where this step has one."""
        since = step - self.config.warmup_steps
        if len(rounds) > 1 or since % self.config.meta_every:
            return ()
        prompts = draw(self.config.validation_prompts)
        self._validation = frozenset(prompt.prompt_id for prompt in prompts)
        return [self.request(prompt) for prompt in prompts]

    def assemble(
        self, plan: StepPlan, groups: Sequence[RolloutGroup], step: int
    ) -> Sequence[Update]:
        self.open_step()
        held_out = [g for g in groups if g.prompt.prompt_id in self._validation]
        self._validation_rows = self.credit(rollout_rows(held_out))
        rest = [g for g in groups if g.prompt.prompt_id not in self._validation]
        rows = rollout_rows(rest) + self.demonstration_rows(plan.experts)
        coefs = self.coefs(step)
        if step < self.config.warmup_steps:
            coefs["mu"] = 1.0
        return [self.update(self.credit(rows), coefs)]

    def open_step(self) -> None:
        self._mu_before, self._entropies = self.mu, []
        self._gradients, self.meta_gradient = None, 0.0

    def probes(self, updates: Sequence[Update], step: int) -> Mapping[str, Update]:
        """The validation gradient, and those of the step's own loss at both ends of mu."""
        if not self._validation_rows:
            return {}
        (main,) = updates
        return {
            "validation": Update(tuple(self._validation_rows), "validation", {}),
            "sft": replace(main, coefs={**main.coefs, "mu": 1.0}),
            "rl": replace(main, coefs={**main.coefs, "mu": 0.0}),
        }

    def observe_gradients(self, comparison: GradientComparison) -> None:
        self._gradients = comparison

    def observe(self, report: UpdateReport) -> None:
        """Move mu by what the step's minibatches say so far; the last one has the final word."""
        entropy = report.metrics.get("policy_entropy")
        if entropy is None:
            return
        self._entropies.append(entropy)
        if self.entropy_target is None:
            self.entropy_target = entropy
        if self._gradients is not None:
            kind = self.config.meta_gradient
            self.meta_gradient = meta_gradient(self._gradients, report.learning_rate, kind)
        entropy = fmean(self._entropies)
        self.mu = next_mu(
            self._mu_before, self.meta_gradient, entropy, self.entropy_target, self.config
        )

    def step_size(self, num_prompts: int, step: int) -> StepSize:
        """Demonstrations alone in the warm-up, then beside the rollouts; a second round every `meta_every` steps."""
        since = step - self.config.warmup_steps
        if since < 0:
            return StepSize(0, 0, num_prompts, (self.phase(num_prompts),))
        size, held_out = super().step_size(num_prompts, step), 0
        if since % self.config.meta_every == 0:
            held_out = self.config.validation_prompts * self.config.rollouts_per_prompt
        phase = self.phase(size.rollouts + num_prompts)
        return StepSize(size.rollouts + held_out, 1 + (held_out > 0), num_prompts, (phase,))

    def metrics(self) -> Mapping[str, float]:
        """next_mu: what the following step trains with; meta_gradient in the steps that measured one."""
        metrics = {"next_mu": self.mu}
        if self._gradients is not None:
            metrics["meta_gradient"] = self.meta_gradient
        if self.entropy_target is not None:
            metrics["entropy_target"] = self.entropy_target
        return metrics

    def ledger(self, updates: Sequence[Update], step: int) -> ExpertLedger:
        held_out = dict.fromkeys(self._validation, "validation")
        return replace(super().ledger(updates, step), unused=held_out)

    def state_dict(self) -> dict[str, Any]:
        own = {"mu": self.mu, "entropy_target": self.entropy_target}
        return {**own, **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mu, self.entropy_target = state["mu"], state["entropy_target"]
        super().load_state_dict(state)
