"""Accuracy of a model on held-out prompts, with its uncertainty, pass@k and maj@k, also by data set and difficulty."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import comb
from statistics import fmean
from typing import Any

from .config import EvalConfig
from .errors import RewardError
from .types import Prompt, RolloutGroup, RolloutRequest, Sampling, Score

SUCCESS = 1.0
"""Reward from which a rollout counts as correct in accuracy metrics."""
HELD_OUT = "held_out"
"""Name of the prompts that belong to no part of a mixture and to no evaluation set, where others do."""
MAX_LEVELS = 10
"""Different difficulties that are reported one by one; more are reported in quarters."""
_Z = 1.96


@dataclass(frozen=True)
class EvalResult:
    """Accuracy over scored rollouts; UNKNOWN ones are counted beside, not in it."""

    accuracy: float
    low: float
    high: float
    """95 % interval of the accuracy: Wilson's with one rollout a prompt, else of the prompts' own accuracies."""
    mean_reward: float
    num_prompts: int
    num_scored: int
    num_unknown: int
    mean_response_length: float
    pass_at: Mapping[str, float] = field(default_factory=dict)
    """k -> pass@k for powers of two, over prompts with at least k scored rollouts; empty with one rollout a prompt."""
    maj_at: Mapping[str, float] = field(default_factory=dict)
    """k -> maj@k for powers of two, over `num_voted` prompts; empty with one rollout a prompt."""
    num_voted: int = 0
    """Prompts of which every score that is known tells its answer (Score.answer)."""
    sets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The fields above for each part of a mixture and each evaluation set; empty where there is one. Those that need
    a known score are absent where there is none."""
    difficulties: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """As `sets`, by the column `difficulty`, within each set."""


def evaluation_requests(
    prompts: Sequence[Prompt], config: EvalConfig, max_tokens: int
) -> list[RolloutRequest]:
    """What is sampled; `max_tokens` holds where the section sets no limit of its own."""
    sampling = Sampling(config.max_response_length or max_tokens, config.temperature)
    return [RolloutRequest(prompt, config.rollouts_per_prompt, sampling) for prompt in prompts]


def evaluate_groups(groups: Sequence[RolloutGroup]) -> EvalResult:
    """Raises RewardError where no score is known."""
    named = {group.prompt.part for group in groups} != {""}
    levels = difficulty_levels([group.prompt for group in groups])
    return replace(
        measure(groups),
        sets=slices(groups, lambda prompt: prompt.part or HELD_OUT) if named else {},
        difficulties=slices(groups, lambda prompt: levels.get(prompt.prompt_id)),
    )


def measure(groups: Sequence[RolloutGroup]) -> EvalResult:
    """Of all groups together. Raises RewardError where no score is known."""
    rewards = [reward for group in groups for reward in group.rewards]
    total = sum(len(group.scores) for group in groups)
    if not rewards:
        reasons = Counter(score.reason for group in groups for score in group.scores).most_common(3)
        raise RewardError(
            f"evaluation has no known score, all {total} are UNKNOWN: "
            f"{'; '.join(f'{n} x {reason}' for reason, n in reasons)}. Correct the reward function or the data"
        )
    counts = [
        (len(group.rewards), sum(reward >= SUCCESS for reward in group.rewards))
        for group in groups
        if group.rewards
    ]
    low, high = accuracy_interval(counts)
    lengths = [len(rollout.token_ids) for group in groups for rollout in group.rollouts]
    return EvalResult(
        accuracy=sum(right for _, right in counts) / len(rewards),
        low=low,
        high=high,
        mean_reward=fmean(rewards),
        num_prompts=len(groups),
        num_scored=len(rewards),
        num_unknown=total - len(rewards),
        mean_response_length=fmean(lengths),
        pass_at=pass_at_powers(counts),
        maj_at=majority_at_powers(groups),
        num_voted=sum(map(tells_answers, groups)),
    )


def slices(
    groups: Sequence[RolloutGroup], name_of: Callable[[Prompt], str | None]
) -> dict[str, dict[str, Any]]:
    """What `measure` says of the groups of each name, in order of their names; None is in no slice."""
    found: dict[str, list[RolloutGroup]] = {}
    for group in groups:
        if (name := name_of(group.prompt)) is not None:
            found.setdefault(name, []).append(group)
    return {name: describe(mine) for name, mine in sorted(found.items())}


def describe(groups: Sequence[RolloutGroup]) -> dict[str, Any]:
    total = sum(len(group.scores) for group in groups)
    if not any(group.rewards for group in groups):
        return {"num_prompts": len(groups), "num_scored": 0, "num_unknown": total}
    found = asdict(measure(groups))
    del found["sets"], found["difficulties"]
    return found


def difficulty_levels(prompts: Sequence[Prompt]) -> dict[str, str]:
    """Prompt id -> name of its difficulty within its set; without prompts that have none and sets with one value."""
    values: dict[str, dict[str, float]] = {}
    for prompt in prompts:
        if prompt.difficulty is not None:
            values.setdefault(prompt.part, {})[prompt.prompt_id] = prompt.difficulty
    found = {}
    for part, mine in values.items():
        levels = sorted(set(mine.values()))
        if len(levels) < 2:
            continue
        first = levels
        if len(levels) > MAX_LEVELS:
            ranked = sorted(mine.values())
            first = sorted({ranked[i * len(ranked) // 4] for i in range(4)})
        bins = [[v for v in levels if bisect_right(first, v) == i + 1] for i in range(len(first))]
        labels = [f"{b[0]:g}" if len(b) == 1 else f"{b[0]:g}..{b[-1]:g}" for b in bins]
        prefix = f"{part}/" if part else ""
        for prompt_id, value in mine.items():
            found[prompt_id] = prefix + labels[bisect_right(first, value) - 1]
    return found


def flat_result(result: Mapping[str, Any]) -> dict[str, float]:
    """Fields of an EvalResult as metrics: names as in docs/metrics.md, without `eval/`."""
    found: dict[str, float] = {}
    for name, value in result.items():
        match name:
            case "pass_at" | "maj_at":
                short = name.removesuffix("_at")
                found |= {f"{short}@{k}": number for k, number in value.items()}
            case "sets" | "difficulties":
                short = {"sets": "set", "difficulties": "difficulty"}[name]
                for label, mine in value.items():
                    found |= {f"{short}/{label}/{n}": v for n, v in flat_result(mine).items()}
            case _:
                found[name] = value
    return found


def majority_at_powers(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """maj@1, 2, 4, ... up to the most rollouts of a prompt: of each prompt the mean over blocks of k rollouts in a row.

    Over the prompts that tell their answers and have at least one block of k with a known score.
    """
    voters = [group.scores for group in groups if tells_answers(group)]
    most, found, k = max(map(len, voters), default=0), dict[str, float](), 1
    while k <= most and most > 1:
        means = []
        for scores in voters:
            blocks = (majority(scores[i : i + k]) for i in range(0, len(scores) - k + 1, k))
            known = [right for right in blocks if right is not None]
            if known:
                means.append(fmean(known))
        if means:
            found[str(k)] = fmean(means)
        k *= 2
    return found


def tells_answers(group: RolloutGroup) -> bool:
    known = [score for score in group.scores if score.reward is not None]
    return bool(known) and all(score.answer is not None for score in known)


def majority(scores: Sequence[Score]) -> bool | None:
    """Whether the most frequent answer is right, the first one of equals; None where no score is known.

    A response that names no answer has no vote, nor has one with an UNKNOWN score. Nobody's vote is a wrong answer.
    """
    known = [score for score in scores if score.reward is not None]
    votes = [score for score in known if score.answer]
    if not votes:
        return False if known else None
    winner, _ = Counter(score.answer for score in votes).most_common(1)[0]
    first = next(score for score in votes if score.answer == winner)
    return first.reward is not None and first.reward >= SUCCESS


def pass_at_powers(counts: Sequence[tuple[int, int]]) -> dict[str, float]:
    """pass@1, 2, 4, ... up to the most rollouts of a prompt, from (scored, right) of each prompt."""
    most, found, k = max(n for n, _ in counts), dict[str, float](), 1
    while k <= most and most > 1:
        found[str(k)] = fmean(pass_at_k(n, right, k) for n, right in counts if n >= k)
        k *= 2
    return found


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased chance that at least one of k of n rollouts is right (arXiv 2107.03374, equation 1).

    >>> pass_at_k(n=4, right=1, k=2)
    0.5
    """
    return 1.0 - comb(n - right, k) / comb(n, k)


def accuracy_interval(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """95 % interval from (scored, right) of each prompt; rollouts of one prompt are not independent."""
    total, right = sum(n for n, _ in counts), sum(r for _, r in counts)
    if all(n == 1 for n, _ in counts):
        return wilson_interval(right, total)
    if len(counts) == 1:
        return 0.0, 1.0
    # The variance of a ratio of sums over prompts, linearized (Cochran 1977, cluster sampling).
    accuracy, num = right / total, len(counts)
    squares = sum((r - accuracy * n) ** 2 for n, r in counts)
    half = _Z * (num / (num - 1) * squares) ** 0.5 / total
    # Prompts that all agree leave no variance; Wilson's on the number of prompts bounds what that can mean.
    if squares == 0:
        return wilson_interval(round(accuracy * num), num)
    return max(0.0, accuracy - half), min(1.0, accuracy + half)


def wilson_interval(successes: int, n: int, z: float = _Z) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927)."""
    p = successes / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, center - half), min(1.0, center + half)
