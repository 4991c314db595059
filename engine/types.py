"""Every hop of the data's way through the house, as a frozen dataclass.

    Prompt (+ Demonstration) -> StepPlan -> RolloutRequest -> Rollout -> Score -> RolloutGroup
    -> Sample -> Update -> TrainBatch -> PolicyOutput -> LossOutput -> UpdateReport

Letters in shapes: P prompts, G rollouts per prompt, N rows, T tokens of all rows together, V vocabulary.

**Alignment rule.** Index t of every per-token field describes *token t*:
`logprobs[t] = log p(token_t | tokens of the same row before t)`. The first token of a row is never trained. Tensors
know no prompt/response split, only `source`. Unknown is absent (None, or NaN inside an array), never 0.

What happens before training rows is defined in experience.py. Nothing here imports torch: a user's reward function
can import these types in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .experience import (
    TOKEN_COLUMNS,
    Demonstration,
    FinishReason,
    Prompt,
    Rollout,
    RolloutGroup,
    RolloutRequest,
    Sampling,
    Score,
    ScoreStatus,
    StepPlan,
    TokenIds,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "TOKEN_COLUMNS",
    "Demonstration",
    "Denominators",
    "FinishReason",
    "LossOutput",
    "PolicyOutput",
    "Prompt",
    "Rollout",
    "RolloutGroup",
    "RolloutRequest",
    "Sample",
    "Sampling",
    "Score",
    "ScoreStatus",
    "Source",
    "StepPlan",
    "TokenIds",
    "TokenSamples",
    "TokenSampling",
    "TrainBatch",
    "Update",
    "UpdateReport",
]


class Source(IntEnum):
    """Who wrote a token."""

    CONTEXT = 0
    """Prompt, tool output, a hint that is only shown: never trained."""
    POLICY = 1
    """Sampled by the policy being trained."""
    EXPERT = 2
    """Written by a demonstration."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One training row, numpy arrays of length T (this row's tokens).

    A prompt of two tokens, answered by the policy with `4 </s>` for reward 1 in a group whose mean is 0.5:

        token_ids        [17, 10,  28,   2]
        source           [ 0,  0,   1,   1]
        advantages       [ 0,  0, 0.5, 0.5]
        weights          [ 1,  1,   1,   1]   0 removes a token from every component and denominator
        rollout_logprobs [nan, nan, -0.1, -0.2]
    """

    token_ids: np.ndarray
    source: np.ndarray
    advantages: np.ndarray
    weights: np.ndarray
    rollout_logprobs: np.ndarray
    group_id: str
    reward: float | None = None
    policy_version: int | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Fields of TrainBatch that the data stores: one number a token, NaN outside the demonstration."""
    sample_id: str = ""
    """Identity over the whole run, for what an expert loss remembers; empty: the row has none."""
    pair: Literal["chosen", "rejected"] | None = None
    """Role in a comparison of expert rows: rows of one group with a role are compared with each other."""
    labels: np.ndarray | None = None
    """What is predicted where an input hook changed what is read; None: `token_ids` themselves."""
    hidden: np.ndarray | None = None
    """True: no token attends to this one. None: none is hidden."""
    signature: str | None = None
    """Identity of the rollout's final answer (Score.answer); None: the reward told none."""
    shaping: float = 0.0
    """Added to the reward where rewards become advantages (Score.shaping)."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def shaped_reward(self) -> float | None:
        """What advantages are made of. Thresholds, gates and counts read `reward`."""
        return None if self.reward is None else self.reward + self.shaping

    def with_advantage(self, advantage: float, *, on: Source = Source.POLICY) -> Sample:
        """The same row with one advantage on all its tokens of source `on`."""
        advantages = np.where(self.source == on, advantage, self.advantages)
        return replace(self, advantages=advantages.astype(self.advantages.dtype))


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer phase: rows, the loss to use, and the coefficients of this step's schedules.

    A supervised phase beside RL, with AdamW moments of its own and a fixed learning rate:

        Update(rows, "sft", {}, optimizer="expert", learning_rate=1e-6)
    """

    samples: tuple[Sample, ...]
    loss: str
    coefs: Mapping[str, float]
    minibatches: int = 1
    epochs: int = 1
    optimizer: Literal["main", "expert"] = "main"
    """Which AdamW moments this phase reads and writes; the weights are the same."""
    learning_rate: float | None = None
    """Fixed rate of this phase; None follows the learner's schedule."""
    refresh_reference: bool = False
    """True copies the current weights into the frozen reference before this phase."""
    critic_loss: str | None = None
    """Loss that trains the critic on the same minibatches, after the step of each; None: the critic stays."""
    critic_learning_rate: float | None = None
    """As `learning_rate`, of the critic."""


@dataclass(frozen=True, slots=True)
class TokenSampling:
    """How a loss that declares `token_samples` draws tokens at each trained position."""

    num_samples: int
    temperature: float = 1.0
    exact: bool = False
    """Replace sampling frequencies by the tempered probabilities; nothing is drawn then."""
    tempered_logprobs: bool = False
    """Differentiate log-probs of the tempered distribution instead of the policy's own."""


@dataclass(frozen=True, slots=True)
class Denominators:
    """Counts over *all ranks and all micro-batches* of one minibatch; a component divides by its own.

    A row counts for a source when it has at least one trained token of that source.
    """

    policy_tokens: int
    expert_tokens: int
    policy_rows: int
    expert_rows: int
    tokens: int
    """Trained tokens of either source."""
    rows: int
    """Rows with a trained token of either source."""
    positive_tokens: int = 0
    """Trained POLICY tokens whose advantage is above 0."""
    left_out: Denominators | None = None
    """Of rows that are counted above and not computed, because they have no gradient; None: there are none."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainBatch:
    """Rows laid end to end. T tokens in N rows; row i owns tokens `row_starts[i]:row_starts[i+1]`.

    Two rows `17 10 | 28 2` and `17 | 9 9 2` (response after the bar, the second row written by an expert):

        input_ids    [17, 10, 28,  2, 17,  9,  9,  2]
        position_ids [ 0,  1,  2,  3,  0,  1,  2,  3]
        row_ids      [ 0,  0,  0,  0,  1,  1,  1,  1]
        row_starts   [ 0,  4,  8]
        source       [ 0,  0,  1,  1,  0,  2,  2,  2]
    """

    input_ids: Tensor  # i64 [T]
    position_ids: Tensor  # i64 [T]
    row_ids: Tensor  # i64 [T]
    row_starts: Tensor  # i64 [N + 1]
    source: Tensor  # i64 [T]
    advantages: Tensor  # float [T]
    weights: Tensor  # float [T]
    rollout_logprobs: Tensor  # float [T], NaN where the sampler's log-prob is unknown
    rewards: Tensor  # float [N], NaN where the row was never scored
    group_ids: Tensor  # i64 [N], equal for rows of one prompt
    denom: Denominators
    group_names: tuple[str, ...] = ()  # [N] prompt_id of each row
    sample_ids: tuple[str, ...] = ()  # [N] Sample.sample_id
    # Present only where some row has them:
    pairs: Tensor | None = None
    """i64 [N]: 1 chosen, -1 rejected, 0 neither. Paired rows of one group stay in one micro-batch."""
    labels: Tensor | None = None
    """i64 [T]: what is predicted, where it differs from `input_ids`; see `targets`."""
    hidden: Tensor | None = None
    """bool [T]: tokens that no token attends to."""
    # Present only where the loss declares that it needs them, all float [T]:
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    old_entropy: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    # Columns of demonstration data that some expert losses need (docs/expert-losses.md), NaN elsewhere:
    base_logprobs: Tensor | None = None
    history_logprobs: Tensor | None = None
    behaviour_logprobs: Tensor | None = None
    """Of the policy that wrote the demonstration."""
    prompt_attention: Tensor | None = None
    # Where `row_sketch` is a need:
    logit_norms: Tensor | None = None  # float [N], over the row's trained tokens
    logit_sketches: Tensor | None = None  # float [N, SKETCH_SIZE]
    # Set by an algorithm's `prepare`, over the whole minibatch:
    previous_losses: Tensor | None = None
    """float [N]: the row's mean loss at its last visit, NaN on the first."""
    visits: Mapping[str, float] | None = None
    """What the expert loss will remember of this minibatch, once it has been trained."""
    log_normalizers: Tensor | None = None
    """float [N]: the normalizer of each chosen row's prompt."""
    expert_kept: Tensor | None = None
    """bool [T]: supervised tokens that the expert loss keeps."""
    stats: Mapping[str, float] | None = None
    """Counts and other numbers of the minibatch that the expert loss divides by."""
    # Set by the learner where rows begin alike (shared_prefix.py):
    prefix_ids: Tensor | None = None
    """i64 [N]: equal for rows that begin with the same tokens."""
    prefix_lengths: Tensor | None = None
    """i64 [N]: how many tokens they share; 0: none."""
    # Set by collate and the learner:
    row_seeds: Tensor | None = None
    """i64 [N]: what random draws of a row depend on: run seed, step, epoch, group, row number in the update."""

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def targets(self) -> Tensor:
        """i64 [T]: the tokens whose log-probs train."""
        return self.input_ids if self.labels is None else self.labels

    def to(self, device: Any) -> TrainBatch:
        """The same batch with its tensors on `device`."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name in self.__slots__
            if hasattr(value := getattr(self, name), "to")
        }
        return replace(self, **moved)

    @property
    def trained(self) -> Tensor:
        """bool [T]: tokens that are a member of some component."""
        return (self.source != Source.CONTEXT) & (self.weights != 0)

    def is_trained(self, source: Source) -> Tensor:
        """bool [T]: trained tokens written by `source`."""
        return (self.source == source) & (self.weights != 0)


@dataclass(frozen=True, slots=True, eq=False)
class PolicyOutput:
    """The differentiable side of a loss: float32 [T], exactly 0 on tokens that are not trained."""

    logprobs: Tensor
    """NaN for a loss that trains the critic."""
    entropy: Tensor | None = None
    values: Tensor | None = None
    """The critic's present value of the state before each token; only for a loss that needs `new_values`."""
    samples: TokenSamples | None = None
    forward_kl: Tensor | None = None
    """KL(reference || policy) over the whole vocabulary; differentiable."""
    reverse_kl: Tensor | None = None
    """KL(policy || reference)."""
    topk_entropy: Tensor | None = None
    """Entropy of the softmax over the K largest logits; a constant."""
    vocabulary: int = 0
    """Number of logits; set with topk_entropy."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenSamples:
    """Sums over the K tokens a_j drawn at each trained position, [T] each; the [T, V] logits stay in their chunk.

    Target 7, draws 7 3 7 9: hit_rate 1/2, hit_logprobs 2/4 log p(7), miss_logprobs (log p(3) + log p(9)) / 4.
    """

    hit_rate: Tensor
    """Share of draws equal to the row's own token; a constant."""
    hit_logprobs: Tensor
    """1/K x sum of log p(a_j) over draws equal to the row's own token; differentiable."""
    miss_logprobs: Tensor
    """1/K x sum of log p(a_j) over the other draws; differentiable."""


@dataclass(frozen=True, slots=True, eq=False)
class LossOutput:
    """A scalar attached to the graph, and metrics already divided: both are *summed* over micro-batches and ranks."""

    loss: Tensor
    metrics: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What one optimizer step did."""

    loss_name: str
    grad_norm: float
    """L2 norm over all parameters and ranks, before clipping."""
    metrics: Mapping[str, float]
    learning_rate: float
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Trained tokens by source ("policy", "expert"), or "critic"; "computed" (all of the forward pass), "left_out"."""
    model: Literal["policy", "critic"] = "policy"
    """Which weights moved."""
    prompts: tuple[str, ...] = ()
    """Ids of the prompts whose rows it trained."""
    skipped: str = ""
    """What was not finite, so that every rank left out the step: "" where it was applied."""

    @property
    def applied(self) -> bool:
        return not self.skipped
