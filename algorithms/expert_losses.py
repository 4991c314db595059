"""Interchangeable losses on demonstration tokens: `expert_loss: {type: ...}`. One type = one config + one function.

Each function gives x_t, the loss of one supervised token before token weights and normalization, from the log-prob of
that token (float32 or better, [T]). Weights that depend on the policy are constants: without the detach, DFT's -p log p
would *lower* p wherever p < 1/e.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ..engine.config import Section

if TYPE_CHECKING:
    from torch import Tensor


class Nll(Section):
    """Negative log-likelihood: x = -log p."""

    type: Literal["nll"] = "nll"

    def __call__(self, logprobs: Tensor) -> Tensor:
        return -logprobs


class Dft(Section):
    """Dynamic fine-tuning (arXiv 2508.05629): x = -sg[p] log p, the gradient of 1 - p."""

    type: Literal["dft"] = "dft"

    def __call__(self, logprobs: Tensor) -> Tensor:
        return -logprobs.detach().exp() * logprobs


class Phi(Section):
    """CHORD-phi (arXiv 2508.11408): x = -sg[p (1 - p)] log p; the weight is at most 1/4, at p = 1/2."""

    type: Literal["phi"] = "phi"

    def __call__(self, logprobs: Tensor) -> Tensor:
        probability = logprobs.detach().exp()
        return -probability * (1 - probability) * logprobs


ExpertLoss = Annotated[Nll | Dft | Phi, Field(discriminator="type")]
