"""Before training: prompts, what experts wrote, what the policy sampled, and how it was scored.

The first half of the data's way through the house; `types.py` names it all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

TokenIds = tuple[int, ...]
FinishReason = Literal["stop", "length", "abort"]


TOKEN_COLUMNS = (
    "token_weights",
    "base_logprobs",
    "ref_logprobs",
    "history_logprobs",
    "behaviour_logprobs",
    "prompt_attention",
)
"""Numbers that a data set may store for each token of a demonstration; see docs/expert-losses.md."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What an expert wrote in answer to a prompt; token_ids end with the end-of-sequence token.

    >>> Demonstration(token_ids=(28, 2), text="4", origin="reasoning_gym", piece_lengths=(1,)).score is None
    True
    """

    token_ids: TokenIds
    text: str
    origin: str = ""
    columns: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """What the data says of each token, one number for each of `token_ids`: names are those of TOKEN_COLUMNS."""
    score: Score | None = None
    """Verdict of the run's verifier on `text`, or the score stored with the data; None where it has neither."""
    piece_lengths: tuple[int, ...] = ()
    """Tokens of each piece (line or sentence) of `text`, in order, without the end token: what a hint is cut from.
    The last piece is taken to hold the final answer."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question, already tokenized with the chat template and its generation prompt.

    >>> Prompt("sums/0", ({"role": "user", "content": "2+2?"},), (17, 10, 17), answer="4").reward is None
    True
    """

    prompt_id: str
    messages: tuple[Mapping[str, str], ...]
    token_ids: TokenIds
    answer: str | None = None
    reward: str | None = None
    """Name of the reward that grades this prompt; None means the recipe's own."""
    demonstrations: tuple[Demonstration, ...] = ()
    rejected: tuple[Demonstration, ...] = ()
    """Responses that pairwise expert losses hold against the first demonstration."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    part: str = ""
    """Part of a data mixture, or evaluation set, that it was drawn from; "" where it belongs to neither."""
    difficulty: float | None = None
    """Larger is harder; None where the data does not say."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the rollout policy draws tokens; temperature 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """n rollouts of one prompt, each starting with the forced tokens of `prefix` (usually none).

    `first_index` numbers the rollouts when one prompt has several requests in a round (plain and prefixed ones); the
    loop adds the number of its rollouts in earlier rounds. `begun` holds what an earlier step sampled of them.
    """

    prompt: Prompt
    n: int
    sampling: Sampling
    prefix: TokenIds = ()
    first_index: int = 0
    begun: tuple[Rollout, ...] = ()
    """Finished rollouts, and those with finish_reason "abort", which go on."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sample. All its generated tokens come from one `policy_version`, but where it was begun in an earlier step.

    >>> Rollout("sums/0", 0, (20, 28, 2), 1, (-0.1, -0.2), 7, "stop", " 4").logprobs   # of 28 and 2
    (-0.1, -0.2)
    """

    prompt_id: str
    index: int
    token_ids: TokenIds
    """Prefix, then generated tokens, end-of-sequence included when finish_reason is "stop"."""
    prefix_len: int
    logprobs: tuple[float, ...]
    """The sampler's, of the generated part only."""
    policy_version: int
    """The oldest, where several had a part in it."""
    finish_reason: FinishReason
    text: str


class ScoreStatus(StrEnum):
    OK = "ok"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Score:
    """A verifier's verdict: a number, or UNKNOWN with the reason. UNKNOWN is never a number.

    >>> Score.ok(1.0).reward, Score.unknown("deadline of 5 s exceeded").reward
    (1.0, None)
    """

    status: ScoreStatus
    reward: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    answer: str | None = None
    """The final answer that the verifier read, normalized: equal answers are equal strings. "" where the response names
    none; None where the reward tells no answers."""
    shaping: float = 0.0
    """What the recipe's `reward.shaping` adds for training. `reward` alone says what is right."""

    @classmethod
    def ok(
        cls, reward: float, parts: Mapping[str, float] | None = None, answer: str | None = None
    ) -> Score:
        return cls(ScoreStatus.OK, float(reward), dict(parts or {}), answer=answer)

    @classmethod
    def unknown(cls, reason: str) -> Score:
        return cls(ScoreStatus.UNKNOWN, None, {}, reason)


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All rollouts of one prompt in one round of a step, scored, ordered by index."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    scores: tuple[Score, ...]

    @property
    def rewards(self) -> tuple[float, ...]:
        """Rewards of the rollouts whose score is known."""
        return tuple(score.reward for score in self.scores if score.reward is not None)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step does: who is rolled out, and whose demonstration trains."""

    requests: tuple[RolloutRequest, ...] = ()
    experts: tuple[Prompt, ...] = ()
