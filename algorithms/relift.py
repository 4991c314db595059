"""ReLIFT: RL, interleaved with fine-tuning on the questions that RL cannot solve (arXiv 2506.07527).

Objective: `main` as grpo. `sft`: expert loss - expert_entropy_coef x entropy, both over EXPERT tokens and both with
`expert_normalizer` (the one place where an entropy is not normalized by tokens).

A prompt all of whose rollouts failed goes, if it has a demonstration, to a buffer; a full buffer triggers one extra
optimizer phase `sft` after the RL update of that step. That phase has its own AdamW moments and a fixed learning rate.
Newest first; nothing is evicted or tested again; a prompt may be in the buffer twice. A group with an UNKNOWN score is
not known to have failed. With `skip_out_of_reach_steps`, rollouts of a probe decide in the first steps.

Departs from the public code: an absent buffer has length 0 (there it crashes); `sft` is a true mean (there scaled by
1 / ranks); the buffer is in the checkpoint. From the paper: no clipping and no division by the standard deviation in
`main`, as in the code; `sft` is a token mean (`rows` is the paper's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from pydantic import Field

from ..engine.contracts import LossFn, Need
from ..engine.errors import CheckpointError
from ..engine.ledger import ExpertLedger
from ..engine.step_record import QUEUED
from ..engine.types import (
    LossOutput,
    PolicyOutput,
    Prompt,
    RolloutGroup,
    Score,
    Source,
    StepPlan,
    TrainBatch,
    Update,
    UpdateReport,
)
from .advantages import Estimator
from .base import ExpertFields, PolicyFields, Setup, surrogate_needs, surrogate_only
from .grpo import grpo_loss
from .losses import Members, Normalizer, expert_component
from .reach import ReachFields, ReachGate
from .rounds import has_failed
from .step_size import Phase, StepSize


class ReliftConfig(PolicyFields, ExpertFields, ReachFields):
    standalone_experts = True
    type: Literal["relift"] = "relift"
    expert_batch_size: int = Field(default=128, ge=1)
    """Failed prompts that make a fine-tuning phase (M in the paper)."""
    failure_threshold: float = 0.0
    """A prompt failed when no rollout's reward is above this."""
    expert_entropy_coef: float = Field(default=0.001, ge=0)
    expert_epochs: int = Field(default=1, ge=1)
    expert_learning_rate: float = Field(default=1e-6, gt=0)
    expert_optimizer: Literal["separate", "shared"] = "separate"
    """separate: AdamW moments of its own; shared: those of `main`."""
    advantage: Estimator = "group_mean"
    clip_low: float | None = Field(default=None, ge=0)
    clip_high: float | None = Field(default=None, ge=0)
    normalizer: Normalizer = "constant"
    entropy_coef: float = Field(default=0.001, ge=0)


def relift_sft_loss(
    out: PolicyOutput, batch: TrainBatch, coefs: Mapping[str, float], *, config: ReliftConfig
) -> LossOutput:
    """Expert loss minus an entropy bonus with the same normalizer; out.logprobs and out.entropy are [T]."""
    normalizer, longest = config.expert_normalizer, config.max_response_length
    loss, metrics = expert_component(out, batch, config.expert_loss, normalizer, longest, coefs)
    if out.entropy is None:
        if config.expert_entropy_coef == 0:
            return LossOutput(loss, metrics)
        raise ValueError("expert_entropy_coef > 0 needs entropy; declare it in `needs`")
    entropy = Members.expert(batch).normalize(out.entropy, batch, normalizer, longest)
    metrics = {**metrics, "expert_entropy": entropy.detach()}
    return LossOutput(loss - config.expert_entropy_coef * entropy, metrics)


class Relift(ReachGate):
    Config = ReliftConfig

    def __init__(self, config: ReliftConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.buffer: list[Prompt] = []
        self.sft_phases = 0
        self._failed_prompts = 0
        self._unused: dict[str, str] = {}
        self._failed_share: float | None = None

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {
            "main": partial(grpo_loss, config=self.config),
            "sft": partial(relift_sft_loss, config=self.config),
        }

    @property
    def advantage_only(self) -> Mapping[str, frozenset[Source]]:
        return surrogate_only(self.config, Source.POLICY)

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        sft: set[Need] = {"demonstrations"}
        if self.config.expert_entropy_coef > 0:
            sft.add("entropy")
        sft |= self.config.expert_loss.needs
        return {"main": surrogate_needs(self.config, expert=False), "sft": frozenset(sft)}

    def assemble(
        self, plan: StepPlan, groups: Sequence[RolloutGroup], step: int
    ) -> Sequence[Update]:
        skipped = plan.experts
        updates = [*super().assemble(replace(plan, experts=()), groups, step)]
        threshold = self.config.failure_threshold
        failed = [group.prompt for group in groups if has_failed(group, threshold)] + [*skipped]
        known = len(groups) + len(skipped)
        self._failed_prompts = len(failed)
        self._failed_share = len(failed) / known if known else None
        self._unused = {g.prompt.prompt_id: self.why_unused(g) for g in groups}
        self._unused |= {prompt.prompt_id: QUEUED for prompt in skipped}
        batch = self.take_batch([prompt for prompt in failed if prompt.demonstrations])
        if batch is not None:
            updates.append(self.sft_update(batch, step))
        return updates

    def why_unused(self, group: RolloutGroup) -> str:
        """Of a prompt that is in no `sft` phase of this step."""
        if has_failed(group, self.config.failure_threshold):
            return QUEUED
        solved = any(reward > self.config.failure_threshold for reward in group.rewards)
        return "solved" if solved else "unknown_score"

    def take_batch(self, failed: Sequence[Prompt]) -> list[Prompt] | None:
        """Put failed prompts in front of the buffer; a full one gives its first `expert_batch_size`."""
        size = self.config.expert_batch_size
        self.buffer = [*failed, *self.buffer]
        if len(self.buffer) < size:
            return None
        batch, self.buffer = self.buffer[:size], self.buffer[size:]
        return batch

    def sft_update(self, prompts: Sequence[Prompt], step: int) -> Update:
        config = self.config
        return Update(
            tuple(self.alone(self.demonstration_rows(prompts), prompts, step)),
            "sft",
            self.coefs(step),
            epochs=config.expert_epochs,
            optimizer="expert" if config.expert_optimizer == "separate" else "main",
            learning_rate=config.expert_learning_rate,
        )

    def observe(self, report: UpdateReport) -> None:
        self.sft_phases += report.loss_name == "sft"

    def step_size(self, num_prompts: int, step: int) -> StepSize:
        """Every prompt fails, so the buffer fills as fast as it can."""
        size, full = super().step_size(num_prompts, step), self.config.expert_batch_size
        due = (step + 1) * num_prompts // full > step * num_prompts // full
        if not due:
            return size
        rows = full * self.rows_per_expert
        sft = Phase("sft", rows, epochs=self.config.expert_epochs)
        return replace(size, expert_rows=rows, phases=(*size.phases, sft))

    def metrics(self) -> Mapping[str, float]:
        return {
            **super().metrics(),
            "buffer_size": len(self.buffer),
            "failed_prompts": self._failed_prompts,
            "sft_phases": self.sft_phases // self.config.expert_epochs,
        }

    def ledger(self, updates: Sequence[Update], step: int) -> ExpertLedger:
        """Gate: prompts of the step all of whose rollouts failed, skipped ones included."""
        return ExpertLedger(
            gate_rate=self._failed_share, buffer_size=len(self.buffer), unused=self._unused
        )

    def state_dict(self) -> dict[str, Any]:
        """Prompt ids of the buffer, in order, verdicts on their demonstrations, and optimizer steps of `sft` so far."""
        return {
            "buffer": [prompt.prompt_id for prompt in self.buffer],
            "verdicts": {prompt.prompt_id: verdicts(prompt) for prompt in self.buffer},
            "sft_phases": self.sft_phases,
            **super().state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["buffer"] and self.setup.find_prompt is None:
            raise CheckpointError(
                f"relift's buffer names {len(state['buffer'])} prompts, but Setup.find_prompt is not set"
            )
        find = self.setup.find_prompt
        saved = state["verdicts"]
        self.buffer = [graded(find(name), saved[name]) for name in state["buffer"]] if find else []
        self.sft_phases = state["sft_phases"]
        super().load_state_dict(state)


def verdicts(prompt: Prompt) -> list[float | str | None]:
    """Of each demonstration: its reward, the reason why it is UNKNOWN, or None where it was not graded."""
    scores = [demonstration.score for demonstration in prompt.demonstrations]
    return [None if s is None else s.reason if s.reward is None else s.reward for s in scores]


def graded(prompt: Prompt, saved: Sequence[float | str | None]) -> Prompt:
    """The prompt with the verdicts that a checkpoint holds."""
    scores = [
        None if v is None else Score.unknown(v) if isinstance(v, str) else Score.ok(v)
        for v in saved
    ]
    pairs = zip(prompt.demonstrations, scores, strict=True)
    return replace(prompt, demonstrations=tuple(replace(d, score=score) for d, score in pairs))
