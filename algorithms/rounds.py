"""Reading the groups of a step's rounds: which of them belong to one prompt, and whether it failed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..engine.types import RolloutGroup


def groups_by_prompt(groups: Iterable[RolloutGroup]) -> list[list[RolloutGroup]]:
    """The groups of each prompt, in the order of their rounds."""
    found: dict[str, list[RolloutGroup]] = {}
    for group in groups:
        found.setdefault(group.prompt.prompt_id, []).append(group)
    return list(found.values())


def has_failed(group: RolloutGroup, threshold: float) -> bool:
    """Every rollout of the group is known to be wrong."""
    return all_failed([score.reward for score in group.scores], threshold)


def all_failed(rewards: Sequence[float | None], threshold: float) -> bool:
    """Every rollout, of at least one, is known to be wrong."""
    return bool(rewards) and all(r is not None and r <= threshold for r in rewards)
