"""Input hooks of expert losses: what the model reads on a demonstration row changes, what it must predict stays.

masked_thought (arXiv 2403.02178): some response tokens are read as a mask token, so that each step of a solution must
be found from more than the words just before it. qfft (Question-Free Fine-Tuning): the question is left out.

Draws depend on run seed, loop step and prompt id: a row is masked anew each time the data comes round to it, and a
resumed run repeats its draws. Old and reference log-probs are computed on the same changed input, since they belong to
the same row; what the data stores of the unchanged one is dropped. The masked_thought scripts use a rate of 0.66; the
template of qfft's code is not verified.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from ..engine.config import Section
from ..engine.errors import ConfigError
from ..engine.types import Prompt, Sample, Source, TokenIds
from .draws import uniforms

PATH = "algorithm.expert_loss.input_hook"


@dataclass(frozen=True)
class HookContext:
    """What a hook may know beyond the row and its prompt."""

    step: int
    seed: int
    empty_prompt: Callable[[Prompt], TokenIds] | None
    vocabulary_size: int | None


class InputHookBase(Section):
    def coefs(self, step: int) -> dict[str, float]:
        """Scheduled numbers at this many completed steps, for the log."""
        return {}

    @abstractmethod
    def rewrite(self, row: Sample, prompt: Prompt, context: HookContext) -> Sample:
        """The row as the model shall read it; `labels` hold what it must predict where that differs."""


class MaskedThought(InputHookBase):
    """A supervised token whose draw is below mask_rate(step) is read as the mask token, or as a random one."""

    type: Literal["masked_thought"] = "masked_thought"
    mask_rate: float = Field(default=0.4, ge=0, le=1)
    """Highest rate (the paper: 0.2 on larger sets)."""
    warmup_fraction: float = Field(default=2 / 3, ge=0)
    """Share of `total_steps` in which the rate rises from 0."""
    total_steps: int = Field(ge=1)
    """Loop steps of the run."""
    replacement: Literal["mask_token", "random_token"] = "mask_token"
    mask_token_id: int | None = Field(default=None, ge=0)
    """Required and read by `mask_token` alone: an id the model does not use otherwise."""
    hide_from_attention: bool = False
    """Later tokens do not attend to masked ones either."""

    @model_validator(mode="after")
    def _mask_token(self) -> MaskedThought:
        if self.replacement == "mask_token" and self.mask_token_id is None:
            raise ValueError("masked_thought: replacement mask_token needs mask_token_id")
        return self

    def coefs(self, step: int) -> dict[str, float]:
        """mask_rate = min(r, r step / (total_steps warmup_fraction + 1))."""
        ramp = step / (self.total_steps * self.warmup_fraction + 1)
        return {"mask_rate": min(self.mask_rate, self.mask_rate * ramp)}

    def masked(self, supervised: np.ndarray, draws: np.ndarray, step: int) -> np.ndarray:
        """bool [T]: supervised tokens (bool [T]) whose draw [T] lies below the rate."""
        return supervised & (draws < self.coefs(step)["mask_rate"])

    def replaced(
        self, ids: np.ndarray, masked: np.ndarray, random_ids: np.ndarray | None
    ) -> np.ndarray:
        """ids [T] with the masked ones read as the mask token, or as `random_ids` [T]."""
        if random_ids is None:
            random_ids = np.full_like(ids, self.mask_token_id)
        return np.where(masked, random_ids, ids).astype(ids.dtype)

    def rewrite(self, row: Sample, prompt: Prompt, context: HookContext) -> Sample:
        size = context.vocabulary_size
        if size is None:
            raise ConfigError.at(PATH, "masked_thought", "needs Setup.vocabulary_size")
        if self.mask_token_id is not None and self.mask_token_id >= size:
            message = f"the model's vocabulary has {size} tokens; name one of them"
            raise ConfigError.at(f"{PATH}.mask_token_id", self.mask_token_id, message)
        supervised = (row.source == Source.EXPERT) & (row.weights != 0)
        key = (context.seed, "masked_thought", context.step, row.group_id, row.pair or "")
        draws = np.asarray(uniforms(2 * len(row), *key)).reshape(2, -1)
        masked = self.masked(supervised, draws[0], context.step)
        random_ids = None
        if self.replacement == "random_token":
            random_ids = (draws[1] * size).astype(row.token_ids.dtype)
        return replace(
            row,
            token_ids=self.replaced(row.token_ids, masked, random_ids),
            labels=row.token_ids,
            hidden=masked if self.hide_from_attention else None,
            columns={},
        )


class Qfft(InputHookBase):
    """The response follows an empty question: the chat template with an empty user turn, or nothing at all."""

    type: Literal["qfft"] = "qfft"
    context: Literal["empty_prompt", "none"] = "empty_prompt"
    """none: the row starts with the response, whose first token then has no predictor and is not trained."""

    def new_context(self, empty_prompt: TokenIds) -> TokenIds:
        return empty_prompt if self.context == "empty_prompt" else ()

    def rewrite(self, row: Sample, prompt: Prompt, context: HookContext) -> Sample:
        empty: TokenIds = ()
        if self.context == "empty_prompt":
            if context.empty_prompt is None:
                raise ConfigError.at(PATH, "qfft", "context empty_prompt needs Setup.empty_prompt")
            empty = context.empty_prompt(prompt)
        return with_context(row, len(prompt.token_ids), self.new_context(empty))


def with_context(row: Sample, length: int, context: TokenIds) -> Sample:
    """The row with its first `length` tokens exchanged for `context`; a row without context trains its second token
    first.
    """

    def spliced(values: np.ndarray, front: float) -> np.ndarray:
        head = np.full(len(context), front, dtype=values.dtype)
        return np.concatenate([head, values[length:]])

    weights = spliced(row.weights, 1.0)
    weights[: 0 if context else 1] = 0.0
    ids = np.concatenate([np.asarray(context, dtype=row.token_ids.dtype), row.token_ids[length:]])
    return replace(
        row,
        token_ids=ids,
        source=spliced(row.source, Source.CONTEXT),
        advantages=spliced(row.advantages, 0.0),
        weights=weights,
        rollout_logprobs=spliced(row.rollout_logprobs, np.nan),
        columns={},
    )


InputHook = Annotated[MaskedThought | Qfft, Field(discriminator="type")]
