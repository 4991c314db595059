"""What most algorithms share: config fields, group credit, default hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
from pydantic import Field, model_validator

from ..engine.config import Section
from ..engine.contracts import DrawFn, LossFn, Need
from ..engine.errors import ConfigError
from ..engine.ledger import ExpertLedger
from ..engine.probes import GradientComparison
from ..engine.types import (
    Prompt,
    RolloutGroup,
    RolloutRequest,
    Sample,
    Sampling,
    Source,
    StepPlan,
    TokenIds,
    TokenSampling,
    Update,
    UpdateReport,
)
from .advantages import Estimator, estimate_advantages, uniform_groups
from .expert_base import ExpertLossBase
from .expert_losses import ExpertLoss, Nll
from .input_hooks import HookContext
from .losses import KlEstimator, Normalizer
from .rows import expert_rows, paired_rows, rollout_rows
from .step_size import Phase, StepSize

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.types import TrainBatch


STANDALONE_HOSTS = "a host whose expert rows stand alone: sft, regft, relift or sasr"


class AlgorithmConfig(Section):
    """Base of every algorithm's config; `type` names it in the registry, or is `module:Class`."""

    type: str
    max_response_length: int = Field(default=8192, ge=1)
    """Constant of the `constant` normalizer, and the length demonstrations are cut to."""
    standalone_experts: ClassVar[bool] = False
    """True where expert rows stand alone: types that read rewards of stored responses or compare responses, and input
    hooks, are allowed then."""

    @property
    def sections(self) -> Mapping[str, AlgorithmConfig]:
        """The configs that train, by their place in the recipe: this one, or those of its stages."""
        return {"algorithm": self}

    @classmethod
    def with_limit(cls, section: Mapping[str, Any], limit: int) -> dict[str, Any]:
        """A recipe's section with the sampler's response limit where it gives none."""
        return {"max_response_length": limit, **section}

    @model_validator(mode="after")
    def _expert_loss_fits(self) -> AlgorithmConfig:
        loss = getattr(self, "expert_loss", None)
        if not isinstance(loss, ExpertLossBase):
            return self
        hybrid = hasattr(self, "expert_normalizer")
        name = "expert_normalizer" if hybrid else "normalizer"
        kind = getattr(loss, "type", type(loss).__name__)
        if loss.tokens_only and getattr(self, name) != "tokens":
            raise ValueError(f"expert_loss {kind} has counts of its own; {name} must be tokens")
        if loss.standalone and not self.standalone_experts:
            raise ValueError(f"expert_loss {kind} needs {STANDALONE_HOSTS}")
        if loss.input_hook is not None and not self.standalone_experts:
            raise ValueError(f"expert_loss.input_hook needs {STANDALONE_HOSTS}")
        return self


class RolloutFields(AlgorithmConfig):
    """Fields of every algorithm that trains rollouts with entropy and KL terms."""

    rollouts_per_prompt: int = Field(default=8, ge=1)
    """Rows of a group, injected expert rows included (G in papers)."""
    normalizer: Normalizer = "tokens"
    entropy_coef: float = Field(default=0.0, ge=0)
    entropy_scope: Literal["policy", "all"] = "policy"
    """policy: POLICY tokens; all: EXPERT tokens too."""
    kl_coef: float = Field(default=0.0, ge=0)
    kl_estimator: KlEstimator = "k3"


class CreditFields(RolloutFields):
    """Fields of every algorithm that gives POLICY tokens advantages, however it finds them."""

    sampler_ratio_cap: float | None = Field(default=None, gt=0)
    """Cap of the importance weight between sampler and learner; null: no correction."""
    sampler_ratio_level: Literal["token", "sequence"] = "token"
    """sequence: one weight a row, the product over its tokens."""
    sampler_ratio_mode: Literal["truncate", "mask"] = "truncate"
    """What becomes of a weight above the cap: the cap, or 0."""
    drop_uniform_groups: bool = False
    """Groups whose scored rows all have the same reward leave the loss."""


class GroupFields(CreditFields):
    """Fields of every algorithm that compares the rows of a group."""

    advantage: Estimator = "group_std"
    advantage_epsilon: float = Field(default=1e-6, gt=0)


class SurrogateFields(CreditFields):
    """Fields of every algorithm with a policy surrogate."""

    clip_low: float | None = Field(default=0.2, ge=0)
    """null: no lower bound on the ratio."""
    clip_high: float | None = Field(default=0.2, ge=0)
    dual_clip: float | None = Field(default=None, gt=1)
    ratio_level: Literal["token", "sequence"] = "token"


class PolicyFields(GroupFields, SurrogateFields):
    """Fields of every algorithm with a policy surrogate on group advantages."""


class ExpertFields(AlgorithmConfig):
    """Fields of every algorithm with an expert loss."""

    expert_loss: ExpertLoss = Nll()
    expert_normalizer: Normalizer = "tokens"


SCORED_DEMONSTRATIONS = frozenset[Need]({"demonstrations", "demonstration_scores"})
"""Needs of a loss whose groups hold demonstrations beside rollouts."""


@dataclass(frozen=True)
class Setup:
    """What the rest of the recipe tells an algorithm."""

    sampling: Sampling
    minibatches: int = 1
    epochs: int = 1
    seed: int = 0
    find_prompt: Callable[[str], Prompt] | None = None
    """A training prompt by its id, for state that names prompts; known once the data is loaded."""
    show_hint: Callable[[Prompt, TokenIds], Prompt | None] | None = None
    """The same prompt (and id) with a hint in its user's turn, None where that does not fit; known with the data."""
    empty_prompt: Callable[[Prompt], TokenIds] | None = None
    """The chat template around an empty question, for input hooks; known once the data is loaded."""
    vocabulary_size: int | None = None
    """Number of token ids; known once the data is loaded."""
    is_out_of_reach: Callable[[str], bool] | None = None
    """Whether a probe found every rollout of this prompt wrong; known once the data is loaded."""


def credit_groups(
    samples: Sequence[Sample],
    config: GroupFields,
    sources: Sequence[Source] = (Source.POLICY,),
) -> list[Sample]:
    """Give tokens of `sources` their group's advantage; rows without a reward keep 0.

    With `drop_uniform_groups`, rows of groups that carry no signal get weight 0.
    """
    rewards = [s.shaped_reward for s in samples]
    groups = [s.group_id for s in samples]
    advantages = estimate_advantages(rewards, groups, config.advantage, config.advantage_epsilon)
    rows = []
    for sample, advantage in zip(samples, advantages, strict=True):
        if sample.reward is not None:
            for source in sources:
                sample = sample.with_advantage(advantage, on=source)
        rows.append(sample)
    return drop_uniform(rows, config)


def drop_uniform(samples: Sequence[Sample], config: CreditFields) -> list[Sample]:
    """With `drop_uniform_groups`, the scored rows of groups whose rewards are all equal get weight 0."""
    if not config.drop_uniform_groups:
        return list(samples)
    dropped = uniform_groups([s.reward for s in samples], [s.group_id for s in samples])
    return [
        replace(sample, weights=np.zeros_like(sample.weights))
        if sample.reward is not None and sample.group_id in dropped
        else sample
        for sample in samples
    ]


class PromptSource(Protocol):
    """What an algorithm asks of the encoded data."""

    @property
    def vocabulary_size(self) -> int | None:
        """Number of token ids, where it is known."""
        ...

    def find(self, prompt_id: str) -> Prompt:
        """A training prompt by its id."""
        ...

    def is_out_of_reach(self, prompt_id: str) -> bool:
        """A probe (data.probe) found every rollout of the start model wrong; False without one."""
        ...

    @property
    def show_hint(self) -> Callable[[Prompt, TokenIds], Prompt | None]:
        """(prompt, hint) -> the prompt with the hint in its user's turn, None where that does not fit."""
        ...

    def empty_prompt(self, prompt: Prompt) -> TokenIds:
        """The chat template around an empty question in place of the prompt's."""
        ...


Plan = TypeVar("Plan", bound=Callable[..., StepPlan])


def may_run_ahead(plan: Plan) -> Plan:
    """Marks a `plan` that depends on nothing an update changes, and keeps nothing in the object.

    Such a step can be sampled while the one before it trains (`loop.staleness`). One that overrides it is marked anew.
    """
    setattr(plan, "may_run_ahead", True)  # noqa: B010 (functions have no such field)
    return plan


class AlgorithmBase(ABC):
    """Default hooks. A subclass sets `Config`, `losses` and `needs`, and overrides what it does differently.

    `assemble` is rows -> `credit` -> one update with `coefs(step)`; most algorithms override only those two.
    """

    Config: ClassVar[type[AlgorithmConfig]]
    token_sampling: TokenSampling | None = None
    every_prompt_demonstrated: bool = False
    """True where each prompt's own demonstration trains, so data without one is refused."""
    trains_own_responses: bool = False
    """True where responses that were just sampled train as EXPERT rows: they have no columns and no earlier visits."""

    def __init__(self, config: Any, setup: Setup) -> None:
        self.config = config
        self.setup = setup
        self.expert_loss: ExpertLossBase | None = getattr(config, "expert_loss", None)
        self.entropy_top_k = self.expert_loss and self.expert_loss.entropy_top_k
        self.expert_memory: dict[str, float] = {}
        """What the expert loss remembers of rows or prompts it has trained (`ExpertLossBase.recall`)."""
        self.unpaired_prompts: int | None = None

    @property
    @abstractmethod
    def losses(self) -> Mapping[str, LossFn]: ...

    @property
    @abstractmethod
    def needs(self) -> Mapping[str, frozenset[Need]]: ...

    @property
    def advantage_only(self) -> Mapping[str, frozenset[Source]]:
        """Losses whose tokens of some sources get no gradient where their advantage is 0; see contracts.Algorithm."""
        return {}

    def use_prompts(self, data: PromptSource) -> None:
        """The data is loaded: state that names prompts can be read, and hints be shown, from now on."""
        self.setup = replace(
            self.setup,
            find_prompt=data.find,
            show_hint=data.show_hint,
            empty_prompt=data.empty_prompt,
            vocabulary_size=data.vocabulary_size,
            is_out_of_reach=data.is_out_of_reach,
        )

    def expert_rows(self, step: int) -> int:
        """Rows that this step draws from the expert stream; most methods take none."""
        return 0

    @property
    def plans_ahead(self) -> bool:
        return getattr(type(self).plan, "may_run_ahead", False)

    def request(self, prompt: Prompt) -> RolloutRequest:
        """A whole group of plain rollouts."""
        return RolloutRequest(prompt, self.config.rollouts_per_prompt, self.setup.sampling)

    @may_run_ahead
    def plan(self, prompts: Sequence[Prompt], experts: Sequence[Prompt], step: int) -> StepPlan:
        return StepPlan(tuple(self.request(prompt) for prompt in prompts), tuple(experts))

    def first_rows(self, plan: StepPlan, step: int) -> Update | None:
        return None

    def follow_up(
        self, rounds: Sequence[Sequence[RolloutGroup]], step: int, draw: DrawFn
    ) -> Sequence[RolloutRequest]:
        """One round of rollouts a step."""
        return ()

    def coefs(self, step: int) -> dict[str, float]:
        """Scheduled coefficients at this many completed steps: the expert loss's; add the algorithm's own to them."""
        return {} if self.expert_loss is None else self.expert_loss.coefs(step)

    def credit(self, samples: Sequence[Sample]) -> list[Sample]:
        """Advantages and weights of one update's rows."""
        return credit_groups(samples, self.config)

    def update(self, samples: Sequence[Sample], coefs: Mapping[str, float]) -> Update:
        return Update(tuple(samples), "main", coefs, self.setup.minibatches, self.setup.epochs)

    def demonstration_rows(self, prompts: Sequence[Prompt]) -> list[Sample]:
        """Demonstrations as rows: the first of each prompt, or all, where the expert loss reads their scores."""
        scored = self.expert_loss is not None and "demonstration_scores" in self.expert_loss.needs
        return expert_rows(prompts, self.config.max_response_length, scored=scored)

    def alone(self, rows: list[Sample], prompts: Sequence[Prompt], step: int) -> list[Sample]:
        """Expert rows of `prompts` that train by themselves: beside rejected ones where the expert loss compares, and
        read as its input hook says.
        """
        loss = self.expert_loss
        if loss is not None and "pairs" in loss.needs:
            rows = paired_rows(rows, prompts, self.config.max_response_length)
            self.unpaired_prompts = len(prompts) - sum(row.pair == "chosen" for row in rows)
        if loss is None or loss.input_hook is None:
            return rows
        setup, by_id = self.setup, {prompt.prompt_id: prompt for prompt in prompts}
        context = HookContext(step, setup.seed, setup.empty_prompt, setup.vocabulary_size)
        return [loss.input_hook.rewrite(row, by_id[row.group_id], context) for row in rows]

    def assemble(
        self, plan: StepPlan, groups: Sequence[RolloutGroup], step: int
    ) -> Sequence[Update]:
        rows = rollout_rows(groups) + self.demonstration_rows(plan.experts)
        return [self.update(self.credit(rows), self.coefs(step))]

    def finish(self, batch: TrainBatch) -> TrainBatch:
        return batch

    def prepare(
        self, batch: TrainBatch, logprobs: Tensor | None, coefs: Mapping[str, float]
    ) -> TrainBatch:
        """What the expert loss counts over the whole minibatch, and what it remembers of its rows."""
        loss = self.expert_loss
        if loss is None or ("minibatch_stats" in loss.needs and logprobs is None):
            return batch  # this update's loss has no expert component
        return loss.recall(loss.prepare(batch, logprobs, coefs), logprobs, self.expert_memory)

    def remember(self, batch: TrainBatch) -> None:
        self.expert_memory |= batch.visits or {}

    def step_size(self, num_prompts: int, step: int) -> StepSize:
        """Upper bounds of a step: a group a prompt and the expert stream, or one demonstration a prompt."""
        rollouts = num_prompts * getattr(self.config, "rollouts_per_prompt", 0)
        experts = self.expert_rows(step) if rollouts else num_prompts
        phase = self.phase(rollouts + experts)
        return StepSize(rollouts, int(rollouts > 0), experts, (phase,))

    @property
    def rows_per_expert(self) -> int:
        """2 where the expert loss compares each demonstration with a rejected response, taken to be one."""
        return 2 if self.expert_loss is not None and "pairs" in self.expert_loss.needs else 1

    def phase(self, rows: int, loss: str = "main") -> Phase:
        return Phase(loss, rows, self.setup.minibatches, self.setup.epochs)

    def observe(self, report: UpdateReport) -> None:  # noqa: B027 (most methods keep no feedback state)
        """Nothing to learn from the report."""

    def metrics(self) -> Mapping[str, float]:
        """`unpaired_prompts`: prompts of the step that a pairwise expert loss could not use."""
        unpaired = self.unpaired_prompts
        return {} if unpaired is None else {"unpaired_prompts": unpaired}

    def ledger(self, updates: Sequence[Update], step: int) -> ExpertLedger:
        """The weight of the expert component: the coefficient mu of an update, or the field expert_coef."""
        mixing = [update.coefs["mu"] for update in updates if "mu" in update.coefs]
        coef = mixing[0] if mixing else getattr(self.config, "expert_coef", None)
        return ExpertLedger(expert_coef=coef)

    def probes(self, updates: Sequence[Update], step: int) -> Mapping[str, Update]:
        return {}

    def observe_gradients(self, comparison: GradientComparison) -> None:  # noqa: B027
        """Nothing was asked for."""

    def state_dict(self) -> dict[str, Any]:
        """What the expert loss remembers. A subclass adds its own state to it."""
        remembers = self.expert_loss is not None and self.expert_loss.remembers
        return {"expert_memory": dict(self.expert_memory)} if remembers else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A subclass reads its own state, then calls this."""
        unknown = state.keys() - self.state_dict().keys()
        if unknown:
            raise ConfigError.at(
                "algorithm.type",
                self.config.type,
                f"the checkpoint holds state ({', '.join(sorted(unknown))}) that this algorithm does not have",
            )
        self.expert_memory = dict(state.get("expert_memory", {}))


def surrogate_needs(config: RolloutFields, *, expert: bool = True) -> frozenset[Need]:
    """What a policy surrogate with entropy and KL terms consumes."""
    return regularizer_needs(config, expert=expert) | frozenset[Need]({"old_logprobs"})


def regularizer_needs(config: RolloutFields, *, expert: bool = True) -> frozenset[Need]:
    """What entropy and KL terms consume, and the expert loss where the config has one.

    `expert` False: the update has no expert component.
    """
    expert_loss = getattr(config, "expert_loss", None) if expert else None
    needs = set[Need]() if expert_loss is None else set[Need](expert_loss.needs)
    if config.entropy_coef > 0:
        needs.add("entropy")
    if config.kl_coef > 0:
        needs.add("ref_logprobs")
    return frozenset(needs)


def surrogate_only(
    config: RolloutFields, *sources: Source, loss: str = "main"
) -> Mapping[str, frozenset[Source]]:
    """`advantage_only` of a loss that trains these sources with an advantage; an entropy or KL term trains them too."""
    regularized = config.entropy_coef > 0 or config.kl_coef > 0
    return {} if regularized else {loss: frozenset(sources)}
