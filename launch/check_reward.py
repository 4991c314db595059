"""`plait check reward`: the gold test of a recipe's verifier, and a second try at a run's UNKNOWN scores."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.errors import ConfigError, DataError, RewardError
from ..engine.evaluation import SUCCESS
from ..engine.types import Demonstration, Prompt, Rollout, RolloutRequest, Sampling, Score
from ..rewards.config import RewardConfig
from ..rollouts.records import Record, Records
from .scoring import UNKNOWN_FILE, open_scorer

if TYPE_CHECKING:
    from ..rewards.gold import GoldReport
    from ..rewards.scorer import ProcessScorer
    from .config import Recipe

CHECKED = 20
"""Prompts of `plait check reward`."""


def check_reward(recipe: Recipe) -> GoldReport:
    """The gold test on prompts spread over the training set. Raises ConfigError where the recipe has no reward."""
    from ..rewards.gold import run_gold_test
    from .run import check_inputs

    inputs = check_inputs(recipe)
    with open_scorer(recipe) as scorer:
        return run_gold_test(scorer, sample(inputs.records, CHECKED))


def refuse_untrue(scorer: ProcessScorer, reward: RewardConfig, records: Records) -> list[str]:
    """What the gold test of a run's start has to say. Raises RewardError where the verifier fails it."""
    from ..rewards.gold import run_gold_test

    if not reward.gold_samples:
        return []
    report = run_gold_test(scorer, sample(records, reward.gold_samples))
    lines = report.lines()
    if not report.passes(reward.max_gold_failures):
        raise RewardError(
            "\n".join(
                [
                    f"reward.function = {reward.function!r} fails on answers whose verdict is known:",
                    *lines,
                    "correct the function or the answers (`plait check reward` repeats this test), raise "
                    f"reward.max_gold_failures = {reward.max_gold_failures:g}, or set reward.gold_samples = 0 where "
                    "the reward is not a verifier",
                ]
            )
        )
    return lines


@dataclass(frozen=True)
class Replayed:
    """One UNKNOWN score of a run, and what the verifier says now."""

    prompt_id: str
    reward: str
    before: str
    now: Score

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_id": self.prompt_id,
            "reward_function": self.reward,
            "before": self.before,
            "reward": self.now.reward,
            "reason": self.now.reason,
        }


def replay(folder: Path, recipe: Recipe) -> list[Replayed]:
    """Grade the inputs of all UNKNOWN scores of the run in `folder` again, with the rewards of `recipe`."""
    from .run import check_inputs

    if recipe.reward is None:
        raise ConfigError.at("reward", None, "the run has none")
    kept = read_unknown(folder / UNKNOWN_FILE)
    records = check_inputs(recipe).records
    wanted = {entry["prompt_id"] for entry in kept}
    prompts = {
        record.prompt_id: as_prompt(record)
        for part in (records.train, records.held_out)
        for record in part
        if record.prompt_id in wanted
    }
    if missing := sorted(wanted - prompts.keys()):
        raise DataError(f"{folder / UNKNOWN_FILE}: the data has no prompt {missing[0]!r}")
    plain = recipe.reward.model_copy(
        update={"shaping": [], "overlong_buffer": None, "max_unknown_fraction": 1.0}
    )
    found = []
    with open_scorer(recipe.model_copy(update={"reward": plain})) as scorer:
        for entry in kept:
            prompt = replace(prompts[entry["prompt_id"]], reward=entry["reward"])
            rollout = Rollout(prompt.prompt_id, 0, (), 0, (), 0, "stop", entry["completion"])
            (group,) = scorer.score([RolloutRequest(prompt, 1, Sampling(1))], [rollout])
            before = entry["reason"]
            found.append(Replayed(prompt.prompt_id, entry["reward"], before, group.scores[0]))
    return found


def replay_lines(found: Sequence[Replayed]) -> list[str]:
    """A line a former reason, then what is still UNKNOWN."""
    lines = []
    for before, count in Counter(r.before for r in found).most_common():
        now = [r.now.reward for r in found if r.before == before]
        right = sum(reward is not None and reward >= SUCCESS for reward in now)
        unknown = now.count(None)
        lines.append(
            f"{count} x {before}: now {right} right, {count - right - unknown} wrong, {unknown} UNKNOWN"
        )
    lines += [f"  {r.prompt_id}: {r.now.reason}" for r in found if r.now.reward is None]
    return lines or ["no score of this run is UNKNOWN"]


def read_unknown(path: Path) -> list[dict[str, Any]]:
    """Raises DataError naming the line that is none of ours; a run without the file has no such score."""
    if not path.exists():
        return []
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            fields = [entry[key] for key in ("prompt_id", "completion", "reward", "reason")]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: not an UNKNOWN score: {error}") from error
        if not all(isinstance(value, str) for value in fields):
            raise DataError(f"{path}, line {number}: not an UNKNOWN score: {line[:80]}")
        entries.append(entry)
    return entries


def sample(records: Records, count: int) -> list[Prompt]:
    """Up to `count` training prompts, spread evenly."""
    total = len(records.train)
    places = [i * total // count for i in range(count)] if total > count else range(total)
    return [as_prompt(records.train[place]) for place in places]


def as_prompt(record: Record) -> Prompt:
    """What a reward sees of a record; nothing is tokenized."""
    return Prompt(
        record.prompt_id,
        record.messages,
        (),
        answer=record.answer,
        reward=record.reward,
        demonstrations=tuple(Demonstration((), text) for text in record.demonstrations),
        metadata=record.metadata,
    )
