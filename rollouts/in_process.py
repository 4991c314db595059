"""Rollouts from a plain transformers model in this process: for proofs that start neither Ray nor vLLM.

As with vLLM, a sample depends on (run seed, step, prompt id, index), the weights and its request, and its log-probs are
those of the distribution it was drawn from. Contexts of equal length are decoded together; there is no scheduler and no
paging, so this is meant for tens of short samples.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.types import Rollout, RolloutRequest, Sampling
from .worker import sample_seed

Task = tuple[RolloutRequest, int]
"""A request and the index of one of its rollouts."""


class ModelSampler:
    """`generate` of contracts.RolloutPool.

    `model`: a causal language model of transformers; `decode`: token ids to text; `stop_token_ids` end a response.
    """

    def __init__(
        self,
        model: Any,
        decode: Callable[[Sequence[int]], str],
        *,
        stop_token_ids: Sequence[int],
        seed: int,
    ) -> None:
        self.model = model.eval()
        self.version = 0
        """Of the weights; every rollout carries it."""
        self._decode, self._stop, self._seed = decode, frozenset(stop_token_ids), seed

    def generate(
        self, requests: Sequence[RolloutRequest], *, step: int
    ) -> Generator[Rollout, None, None]:
        """Yield every requested rollout once."""
        alike: dict[tuple[int, int, Sampling], list[Task]] = {}
        for request in requests:
            length, prefix = len(request.prompt.token_ids), len(request.prefix)
            tasks = alike.setdefault((length + prefix, prefix, request.sampling), [])
            tasks += [(request, request.first_index + i) for i in range(request.n)]
        for (_, prefix, sampling), tasks in alike.items():
            draws = [self._draws(task, step, sampling.max_tokens - prefix) for task in tasks]
            contexts = [[*r.prompt.token_ids, *r.prefix] for r, _ in tasks]
            for task, drawn in zip(
                tasks, self._decode_batch(contexts, sampling, draws), strict=True
            ):
                yield self._rollout(task, *drawn)

    def _draws(self, task: Task, step: int, num: int) -> np.ndarray:
        """One uniform a token."""
        request, index = task
        seed = sample_seed(self._seed, step, request.prompt.prompt_id, index)
        return np.random.default_rng(seed).random(num)

    @torch.no_grad()
    def _decode_batch(
        self, contexts: list[list[int]], sampling: Sampling, draws: list[np.ndarray]
    ) -> list[tuple[list[int], list[float]]]:
        """Token ids and log-probs of each row; contexts have one length, `draws` a uniform for each token to come."""
        chances = torch.from_numpy(np.stack(draws))
        tokens: list[list[int]] = [[] for _ in contexts]
        logprobs: list[list[float]] = [[] for _ in contexts]
        inputs, past = torch.tensor(contexts), None
        for place in range(chances.shape[1]):
            output = self.model(input_ids=inputs, past_key_values=past, use_cache=True)
            past = output.past_key_values
            chosen, chosen_logprobs = choose(output.logits[:, -1], sampling, chances[:, place])
            open_rows = [i for i, row in enumerate(tokens) if not (row and row[-1] in self._stop)]
            for i in open_rows:
                tokens[i].append(int(chosen[i]))
                logprobs[i].append(float(chosen_logprobs[i]))
            if all(tokens[i][-1] in self._stop for i in open_rows):
                break
            inputs = chosen[:, None]
        return list(zip(tokens, logprobs, strict=True))

    def _rollout(self, task: Task, tokens: list[int], logprobs: list[float]) -> Rollout:
        request, index = task
        response = (*request.prefix, *tokens)
        return Rollout(
            prompt_id=request.prompt.prompt_id,
            index=index,
            token_ids=response,
            prefix_len=len(request.prefix),
            logprobs=tuple(logprobs),
            policy_version=self.version,
            finish_reason="stop" if tokens[-1] in self._stop else "length",
            text=self._decode(response),
        )


def choose(logits: Tensor, sampling: Sampling, chances: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the distribution function: logits [n, V], uniforms [n] -> ids [n], log-probs [n].

    Temperature 0 takes the likeliest token, with log-prob 0.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits))
    probabilities = (logits.double() / sampling.temperature).softmax(-1)
    ordered, order = probabilities.sort(descending=True)
    # Kept: the fewest likeliest tokens whose total reaches top_p.
    ordered = ordered.where(ordered.cumsum(-1) - ordered < sampling.top_p, 0.0)
    ordered = ordered / ordered.sum(-1, keepdim=True)
    place = (ordered.cumsum(-1) < chances[:, None]).sum(-1)
    place = place.minimum((ordered > 0).sum(-1) - 1)[:, None]
    return order.gather(-1, place)[:, 0], ordered.gather(-1, place)[:, 0].log()
