"""More prompts are sampled than a step trains: it takes the first that are complete, later ones take the others.

What is sampled of those others is kept (partial rollouts): finished samples, and the tokens of begun ones, which go
on in the next step under its weights. A sample then has log-probs of several policies; its `policy_version` is the
oldest of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter

from .types import Prompt, Rollout, RolloutRequest


@dataclass
class Carried:
    """Prompts that were drawn and not trained yet, and what is sampled of them; a part of the run's state."""

    prompts: list[Prompt] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    """Finished ones, and begun ones: those with finish_reason "abort"."""

    def begin(self, requests: Sequence[RolloutRequest]) -> list[RolloutRequest]:
        """The requests with what is sampled of them already; what follows another prefix by now does not count."""
        of: dict[str, list[Rollout]] = defaultdict(list)
        for rollout in self.rollouts:
            of[rollout.prompt_id].append(rollout)

        def belongs(rollout: Rollout, request: RolloutRequest) -> bool:
            indices = range(request.first_index, request.first_index + request.n)
            same = rollout.token_ids[: rollout.prefix_len] == tuple(request.prefix)
            return rollout.index in indices and same

        return [
            replace(r, begun=tuple(one for one in of[r.prompt.prompt_id] if belongs(one, r)))
            for r in requests
        ]

    @classmethod
    def from_json(cls, values: Any) -> Carried:
        return TypeAdapter(cls).validate_python(values)


class FirstComplete:
    """Passes on the rollouts of the first `enough` prompts of which all have come."""

    def __init__(self, requests: Sequence[RolloutRequest], enough: int) -> None:
        self._missing: Counter[str] = Counter()
        for request in requests:
            self._missing[request.prompt.prompt_id] += request.n
        self.enough = min(enough, len(self._missing))
        self.begun: Sequence[Rollout] = ()
        """Unfinished ones, once the sampling was interrupted."""
        self._held: dict[str, list[Rollout]] = defaultdict(list)

    def of(self, rollouts: Iterable[Rollout]) -> Iterator[Rollout]:
        complete = 0
        for rollout in rollouts:
            mine = self._held[rollout.prompt_id]
            mine.append(rollout)
            if len(mine) == self._missing[rollout.prompt_id]:
                yield from self._held.pop(rollout.prompt_id)
                complete += 1
                if complete == self.enough:
                    return

    @property
    def left(self) -> list[Rollout]:
        """What is sampled of the other prompts."""
        held = (rollout for rollouts in self._held.values() for rollout in rollouts)
        return [*held, *self.begun]


def generated_tokens(rollouts: Collection[Rollout]) -> int:
    return sum(len(rollout.logprobs) for rollout in rollouts)
