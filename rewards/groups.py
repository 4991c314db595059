"""Which rollouts a step is owed, and the groups they end up in."""

import pickle
from collections.abc import Mapping, Sequence

from ..engine.errors import RewardError
from ..engine.types import Prompt, Rollout, RolloutGroup, RolloutRequest, Score

Key = tuple[str, int]
"""Prompt id and rollout index."""


class ExpectedGroups:
    """The rollouts that `requests` ask for. Raises RewardError when two requests ask for the same one."""

    def __init__(self, requests: Sequence[RolloutRequest]) -> None:
        self._prompts: dict[str, Prompt] = {}
        self._expected: dict[str, set[int]] = {}
        self._arrived: dict[Key, Rollout] = {}
        self._pickled: dict[str, bytes] = {}
        for request in requests:
            prompt_id = request.prompt.prompt_id
            self._prompts.setdefault(prompt_id, request.prompt)
            indices = range(request.first_index, request.first_index + request.n)
            asked = self._expected.setdefault(prompt_id, set())
            if asked & set(indices):
                raise RewardError(
                    f"prompt {prompt_id!r} is requested twice with rollout indices {sorted(asked & set(indices))}; "
                    "give the requests of one prompt different first_index values"
                )
            asked.update(indices)

    def admit(self, rollout: Rollout) -> Prompt:
        """Register an arrival. Raises RewardError when nobody asked for it, or it came before."""
        key = (rollout.prompt_id, rollout.index)
        if rollout.index not in self._expected.get(rollout.prompt_id, ()):
            raise RewardError(
                f"rollout {rollout.index} of prompt {rollout.prompt_id!r} was not requested"
            )
        if key in self._arrived:
            raise RewardError(f"rollout {rollout.index} of prompt {rollout.prompt_id!r} came twice")
        self._arrived[key] = rollout
        return self._prompts[rollout.prompt_id]

    def pickled(self, prompt: Prompt) -> bytes:
        """The prompt as it travels to a scoring process; made once for all its rollouts."""
        if prompt.prompt_id not in self._pickled:
            self._pickled[prompt.prompt_id] = pickled(prompt)
        return self._pickled[prompt.prompt_id]

    def check_complete(self, num_groups: int | None = None) -> None:
        """Raises RewardError naming the first prompt whose rollouts did not all arrive.

        With `num_groups`, prompts of which nothing came are no longer expected, and so many others must be left.
        """
        if num_groups is not None:
            came = {prompt_id for prompt_id, _ in self._arrived}
            if len(came) != num_groups:
                raise RewardError(
                    f"the rollout pool ended after {len(came)} of {num_groups} prompts"
                )
            self._expected = {name: asked for name, asked in self._expected.items() if name in came}
        for prompt_id, indices in self._expected.items():
            missing = sorted(i for i in indices if (prompt_id, i) not in self._arrived)
            if missing:
                raise RewardError(
                    f"prompt {prompt_id!r} lacks rollouts {missing} of {len(indices)}: "
                    "the rollout pool ended before it had delivered them"
                )

    def rollout(self, key: Key) -> Rollout:
        return self._arrived[key]

    def grouped(self, scores: Mapping[Key, Score]) -> list[RolloutGroup]:
        """One group for each prompt, in the order of the requests, rollouts ordered by index."""
        groups = []
        for prompt_id, indices in self._expected.items():
            prompt = self._prompts[prompt_id]
            keys = [(prompt_id, index) for index in sorted(indices)]
            rollouts = tuple(self._arrived[key] for key in keys)
            groups.append(RolloutGroup(prompt, rollouts, tuple(scores[key] for key in keys)))
        return groups


def pickled(prompt: Prompt) -> bytes:
    """The prompt as it travels. Raises RewardError where its metadata holds what cannot."""
    try:
        return pickle.dumps(prompt, pickle.HIGHEST_PROTOCOL)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise RewardError(
            f"prompt {prompt.prompt_id!r} cannot be sent to a scoring process: {error}; "
            "keep plain data in its metadata"
        ) from error
