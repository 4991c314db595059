"""Stages: one method after the other in one run, above all sft and then any RL method.

Objective: that of the stage under way. What the learner holds is carried over: weights, AdamW moments, and the
learning-rate schedule over the whole run; so are the positions in the data.

    algorithm:
      type: stages
      stages:
        - {steps: 100, algorithm: {type: sft}}
        - {algorithm: {type: grpo, kl_coef: 0.01}}   # the rest of the run

The `step` that a stage's method sees counts from the beginning of that stage, so its schedules are those of a run of
its own. Its losses carry the number of the stage: `0.main`, `1.main`. Where a later stage has a KL term, the reference
is the policy at the beginning of that stage (`refresh_reference: false`: the model the run started from).

Departs from separate runs: the optimizer's moments and the learning rate do not start again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, ValidationError, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from ..engine.config import Section
from ..engine.contracts import DrawFn, LossFn, Need
from ..engine.errors import ConfigError
from ..engine.ledger import ExpertLedger
from ..engine.probes import GradientComparison
from ..engine.types import (
    Prompt,
    RolloutGroup,
    RolloutRequest,
    Source,
    StepPlan,
    Update,
    UpdateReport,
)
from .base import AlgorithmBase, AlgorithmConfig, PromptSource, Setup
from .step_size import StepSize

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.types import TrainBatch


def resolve(name: str) -> type[AlgorithmBase]:
    """The registry's, which names this file too."""
    from . import resolve

    return resolve(name)


def own_config(value: Any, validate: Callable[[Any], AlgorithmConfig]) -> AlgorithmConfig:
    """Validate a stage's algorithm section as the config of the algorithm that it names."""
    if isinstance(value, AlgorithmConfig):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        return validate(value)
    name = value["type"]
    if name == "stages":
        raise refused("type", name, "a stage cannot have stages of its own; list them one by one")
    try:
        config = resolve(name).Config
    except ConfigError as error:
        raise refused("type", name, error.problems[0].message) from error
    return config.model_validate(value)


def refused(field: str, value: object, message: str) -> ValidationError:
    """An error at a field below the one under validation."""
    error = PydanticCustomError("refused", "{message}", {"message": message})
    return ValidationError.from_exception_data(
        "algorithm", [{"type": error, "loc": (field,), "input": value}]
    )


class Stage(Section):
    algorithm: Annotated[SerializeAsAny[AlgorithmConfig], WrapValidator(own_config)]
    """Any algorithm's section but `stages`."""
    steps: int | None = Field(default=None, ge=1)
    """Loop steps of this stage; null, in the last stage only: the rest of the run."""
    refresh_reference: bool = True
    """The frozen reference of a later stage is a copy of the policy at the stage's beginning."""


class StagesConfig(AlgorithmConfig):
    type: Literal["stages"] = "stages"
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _stages_follow_each_other(self) -> StagesConfig:
        *first, last = (stage.steps for stage in self.stages)
        if None in first or last is not None:
            raise ValueError("every stage but the last needs steps; the last takes the rest")
        limits = {stage.algorithm.max_response_length for stage in self.stages}
        if limits != {self.max_response_length}:
            raise ValueError(
                f"max_response_length of the stages ({', '.join(map(str, sorted(limits)))}) must be the run's "
                f"{self.max_response_length}; leave it out"
            )
        return self

    @property
    def sections(self) -> Mapping[str, AlgorithmConfig]:
        return {f"algorithm.stages.{i}.algorithm": s.algorithm for i, s in enumerate(self.stages)}

    @property
    def starts(self) -> tuple[int, ...]:
        """The loop step at which each stage begins."""
        return tuple(accumulate((stage.steps or 0 for stage in self.stages[:-1]), initial=0))

    @classmethod
    def with_limit(cls, section: Mapping[str, Any], limit: int) -> dict[str, Any]:
        completed = super().with_limit(section, limit)
        stages = completed.get("stages")
        if isinstance(stages, list | tuple):
            length = completed["max_response_length"]
            completed["stages"] = [limited_stage(stage, length) for stage in stages]
        return completed


def limited_stage(stage: Any, limit: int) -> Any:
    """What is no section stays as it is, for validation to name."""
    if not isinstance(stage, dict) or not isinstance(stage.get("algorithm"), dict):
        return stage
    return {**stage, "algorithm": AlgorithmConfig.with_limit(stage["algorithm"], limit)}


class Stages(AlgorithmBase):
    """Hands every hook to the method of the stage that `plan` was last called for."""

    Config = StagesConfig

    def __init__(self, config: StagesConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.members = [resolve(c.type)(c, setup) for c in config.sections.values()]
        self.every_prompt_demonstrated = any(m.every_prompt_demonstrated for m in self.members)
        self.token_sampling = one_for_all(self.members, "token_sampling", "draws tokens")
        self.entropy_top_k = one_for_all(self.members, "entropy_top_k", "measures top-k entropy")
        self.stage = 0
        """Of the step under way."""
        self.entered = 0
        """The last stage that has trained."""

    def stage_at(self, step: int) -> tuple[int, int]:
        """(number of the stage, steps since it began)."""
        starts = self.config.starts
        number = max(i for i, start in enumerate(starts) if start <= step)
        return number, step - starts[number]

    def named(self, name: str) -> str:
        return f"{self.stage}.{name}"

    @property
    def current(self) -> AlgorithmBase:
        return self.members[self.stage]

    @property
    def losses(self) -> Mapping[str, LossFn]:
        return {
            f"{i}.{name}": f for i, m in enumerate(self.members) for name, f in m.losses.items()
        }

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        return {f"{i}.{name}": n for i, m in enumerate(self.members) for name, n in m.needs.items()}

    @property
    def advantage_only(self) -> Mapping[str, frozenset[Source]]:
        return {
            f"{i}.{name}": sources
            for i, m in enumerate(self.members)
            for name, sources in m.advantage_only.items()
        }

    def use_prompts(self, data: PromptSource) -> None:
        super().use_prompts(data)
        for member in self.members:
            member.use_prompts(data)

    def expert_rows(self, step: int) -> int:
        number, own = self.stage_at(step)
        return self.members[number].expert_rows(own)

    def coefs(self, step: int) -> dict[str, float]:
        number, own = self.stage_at(step)
        return self.members[number].coefs(own)

    def plan(self, prompts: Sequence[Prompt], experts: Sequence[Prompt], step: int) -> StepPlan:
        self.stage, own = self.stage_at(step)
        return self.current.plan(prompts, experts, own)

    def follow_up(
        self, rounds: Sequence[Sequence[RolloutGroup]], step: int, draw: DrawFn
    ) -> Sequence[RolloutRequest]:
        return self.current.follow_up(rounds, self.stage_at(step)[1], draw)

    def assemble(
        self, plan: StepPlan, groups: Sequence[RolloutGroup], step: int
    ) -> Sequence[Update]:
        own = self.stage_at(step)[1]
        updates = [
            replace(
                update,
                loss=self.named(update.loss),
                critic_loss=update.critic_loss and self.named(update.critic_loss),
            )
            for update in self.current.assemble(plan, groups, own)
        ]
        if updates and self.stage > self.entered:
            self.entered = self.stage
            if self.moves_reference():
                updates[0] = replace(updates[0], refresh_reference=True)
        return updates

    def moves_reference(self) -> bool:
        has_reference = any(
            needs & {"ref_logprobs", "ref_kl"} for needs in self.current.needs.values()
        )
        return has_reference and self.config.stages[self.stage].refresh_reference

    def finish(self, batch: TrainBatch) -> TrainBatch:
        return self.current.finish(batch)

    def prepare(
        self, batch: TrainBatch, logprobs: Tensor | None, coefs: Mapping[str, float]
    ) -> TrainBatch:
        return self.current.prepare(batch, logprobs, coefs)

    def remember(self, batch: TrainBatch) -> None:
        self.current.remember(batch)

    def observe(self, report: UpdateReport) -> None:
        own_name = report.loss_name.removeprefix(self.named(""))
        self.current.observe(replace(report, loss_name=own_name))

    def ledger(self, updates: Sequence[Update], step: int) -> ExpertLedger:
        return self.current.ledger(self.own(updates), self.stage_at(step)[1])

    def probes(self, updates: Sequence[Update], step: int) -> Mapping[str, Update]:
        wanted = self.current.probes(self.own(updates), self.stage_at(step)[1])
        return {name: replace(u, loss=self.named(u.loss)) for name, u in wanted.items()}

    def observe_gradients(self, comparison: GradientComparison) -> None:
        self.current.observe_gradients(comparison)

    def own(self, updates: Sequence[Update]) -> list[Update]:
        """The updates as the stage's method named them."""
        prefix = self.named("")
        return [replace(u, loss=u.loss.removeprefix(prefix)) for u in updates]

    def step_size(self, num_prompts: int, step: int) -> StepSize:
        number, own = self.stage_at(step)
        return self.members[number].step_size(num_prompts, own)

    def metrics(self) -> Mapping[str, float]:
        return {"stage": self.stage, **self.current.metrics()}

    def state_dict(self) -> dict[str, Any]:
        return {"entered": self.entered, "stages": [m.state_dict() for m in self.members]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.entered = state["entered"]
        for member, own in zip(self.members, state["stages"], strict=True):
            member.load_state_dict(own)


def one_for_all(members: Sequence[AlgorithmBase], name: str, verb: str) -> Any:
    """What the stages agree on; the learner's head works in one way only."""
    found = {i: getattr(m, name) for i, m in enumerate(members) if getattr(m, name) is not None}
    first = next(iter(found.values()), None)
    for i, value in found.items():
        if value != first:
            raise ConfigError.at(
                f"algorithm.stages.{i}.algorithm.type",
                members[i].config.type,
                f"{verb} in another way ({value}) than an earlier stage ({first}); give both the same numbers",
            )
    return first
