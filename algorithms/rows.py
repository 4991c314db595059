"""Training rows: from rollouts, from demonstrations, and from both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..engine.errors import DataError
from ..engine.types import Demonstration, Prompt, RolloutGroup, Sample, Source, TokenIds


def make_row(
    prompt: Prompt,
    response: TokenIds,
    *,
    prefix_len: int,
    prefix_source: Source = Source.EXPERT,
    rollout_logprobs: Sequence[float] = (),
    reward: float | None = None,
    policy_version: int | None = None,
    demonstration: int | None = None,
    signature: str | None = None,
    shaping: float = 0.0,
) -> Sample:
    """Prompt as CONTEXT, `prefix_len` tokens of `prefix_source`, then POLICY tokens with the sampler's log-probs.

    `demonstration`: which of the prompt's the EXPERT tokens are the beginning of; the row takes over its columns.
    """
    context, total = len(prompt.token_ids), len(prompt.token_ids) + len(response)
    source = np.full(total, Source.POLICY, dtype=np.int8)
    source[:context] = Source.CONTEXT
    source[context : context + prefix_len] = prefix_source
    sampled = np.full(total, np.nan, dtype=np.float32)
    if len(rollout_logprobs):
        sampled[context + prefix_len :] = rollout_logprobs
    weights, columns = np.ones(total, dtype=np.float32), dict[str, np.ndarray]()
    if demonstration is not None:
        for name, values in prompt.demonstrations[demonstration].columns.items():
            column = columns[name] = np.full(total, np.nan, dtype=np.float32)
            column[context : context + prefix_len] = values[:prefix_len]
        stored = columns.pop("token_weights", weights)
        weights = np.where(np.isnan(stored), weights, stored)
    return Sample(
        token_ids=np.asarray((*prompt.token_ids, *response), dtype=np.int32),
        source=source,
        advantages=np.zeros(total, dtype=np.float32),
        weights=weights,
        rollout_logprobs=sampled,
        group_id=prompt.prompt_id,
        reward=reward,
        policy_version=policy_version,
        columns=columns,
        sample_id="" if demonstration is None else f"{prompt.prompt_id}#{demonstration}",
        signature=signature,
        shaping=shaping,
    )


def rollout_rows(
    groups: Sequence[RolloutGroup], prefix_source: Source = Source.EXPERT
) -> list[Sample]:
    """Policy and hybrid rows of all rollouts whose score is known; UNKNOWN ones enter no baseline and no loss.

    Forced prefixes are EXPERT tokens, or CONTEXT where they are only shown.
    """
    return [
        make_row(
            group.prompt,
            rollout.token_ids,
            prefix_len=rollout.prefix_len,
            prefix_source=prefix_source,
            rollout_logprobs=rollout.logprobs,
            reward=score.reward,
            policy_version=rollout.policy_version,
            demonstration=None
            if prefix_source == Source.CONTEXT
            else origin_of(group.prompt, rollout.token_ids[: rollout.prefix_len]),
            signature=score.answer,
            shaping=score.shaping,
        )
        for group in groups
        for rollout, score in zip(group.rollouts, group.scores, strict=True)
        if score.reward is not None and len(rollout.token_ids) > 0
    ]


def origin_of(prompt: Prompt, prefix: TokenIds) -> int | None:
    """Which demonstration of the prompt begins with `prefix`; None without a prefix."""
    for i, demonstration in enumerate(prompt.demonstrations):
        if prefix and demonstration.token_ids[: len(prefix)] == prefix:
            return i
    return None


def expert_row(prompt: Prompt, demonstration: Demonstration, max_response_length: int) -> Sample:
    """One of the prompt's demonstrations as a row, cut to `max_response_length` tokens, its columns with it.

    The end token stays only when it fits. Raises DataError when the demonstration has no tokens.
    """
    if not demonstration.token_ids:
        raise DataError(f"prompt {prompt.prompt_id!r}: its demonstration has no tokens; remove it")
    response = demonstration.token_ids[:max_response_length]
    return make_row(
        prompt,
        response,
        prefix_len=len(response),
        demonstration=prompt.demonstrations.index(demonstration),
    )


def expert_rows(
    prompts: Sequence[Prompt], max_response_length: int, *, scored: bool = False
) -> list[Sample]:
    """One row a prompt, from its first demonstration. Raises DataError naming a prompt that has none.

    With `scored`, one row for each of its demonstrations, with the score as reward; UNKNOWN ones are left out.
    """
    for prompt in prompts:
        if not prompt.demonstrations:
            raise DataError(
                f"prompt {prompt.prompt_id!r} has no demonstration, and this algorithm trains one for each prompt"
            )
    if not scored:
        return [expert_row(p, p.demonstrations[0], max_response_length) for p in prompts]
    return [
        replace(expert_row(p, d, max_response_length), reward=d.score and d.score.reward)
        for p in prompts
        for d in demonstrated(p)
    ]


def paired_rows(
    rows: Sequence[Sample], prompts: Sequence[Prompt], max_response_length: int
) -> list[Sample]:
    """The first row of each prompt as chosen, then its rejected responses; prompts lacking either are left out."""
    chosen = {row.group_id: row for row in reversed(rows)}
    paired = []
    for prompt in prompts:
        if prompt.prompt_id in chosen and prompt.rejected:
            paired.append(replace(chosen[prompt.prompt_id], pair="chosen"))
            for rejected in prompt.rejected:
                response = rejected.token_ids[:max_response_length]
                row = make_row(prompt, response, prefix_len=len(response))
                paired.append(replace(row, pair="rejected"))
    return paired


def demonstrated(prompt: Prompt) -> tuple[Demonstration, ...]:
    """Demonstrations that may enter a group: those whose score is known.

    Raises DataError when one was never graded: the loss must declare `demonstration_scores`.
    """
    if any(d.score is None for d in prompt.demonstrations):
        raise DataError(
            f"prompt {prompt.prompt_id!r}: a demonstration was not graded, and this algorithm reads its score; "
            "declare demonstration_scores in the loss's needs"
        )
    return tuple(d for d in prompt.demonstrations if d.score and d.score.reward is not None)


def scored_expert_rows(
    groups: Sequence[RolloutGroup], num: int, max_response_length: int
) -> list[Sample]:
    """Up to `num` demonstrations of each group with a scored rollout, as rows with the verifier's reward.

    Where no rollout is scored there is nothing to compare with.
    """
    return [
        replace(
            expert_row(group.prompt, demonstration, max_response_length),
            reward=score.reward,
            shaping=score.shaping,
        )
        for group in groups
        if group.rewards
        for demonstration in demonstrated(group.prompt)[:num]
        if (score := demonstration.score)
    ]
