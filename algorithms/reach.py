"""Methods that send failed prompts to their demonstrations, told beforehand which prompts the start model fails."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from ..engine.types import Prompt, StepPlan
from .base import AlgorithmBase, AlgorithmConfig, may_run_ahead


class ReachFields(AlgorithmConfig):
    skip_out_of_reach_steps: int = Field(default=0, ge=0)
    """In so many steps from the start, a prompt with a demonstration whose every rollout `plait probe` found wrong
    (data.probe) is not rolled out: it counts as failed. 0: everything is rolled out."""


class ReachGate(AlgorithmBase):
    """Its plans' experts are the prompts that are not rolled out; `assemble` treats them as failed."""

    @may_run_ahead
    def plan(self, prompts: Sequence[Prompt], experts: Sequence[Prompt], step: int) -> StepPlan:
        skipped = [prompt for prompt in prompts if self.is_skipped(prompt, step)]
        names = {prompt.prompt_id for prompt in skipped}
        asked = [prompt for prompt in prompts if prompt.prompt_id not in names]
        return super().plan(asked, (*experts, *skipped), step)

    def is_skipped(self, prompt: Prompt, step: int) -> bool:
        known = self.setup.is_out_of_reach
        if step >= self.config.skip_out_of_reach_steps or known is None:
            return False
        return bool(prompt.demonstrations) and known(prompt.prompt_id)
