"""Scores rollouts in killable processes while they stream in."""

import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import cloudpickle

from ..engine.errors import PlaitError, RewardError
from ..engine.types import Prompt, Rollout, RolloutGroup, RolloutRequest, Score
from .config import RewardConfig
from .frames import RewardSource
from .groups import ExpectedGroups, Key, pickled
from .pool import Job, ProcessPool
from .shaping import OVERLONG, overlong_penalty, shaped

if TYPE_CHECKING:
    from ..engine.contracts import RewardFn

PartKey = tuple[str, int, int]
"""Prompt id, number of the rollout or demonstration, and 0 for the verifier, n for the n-th shaping function."""

_CHECK_SECONDS = 0.2


class ProcessScorer:
    """`contracts.Scorer`: `config.num_workers` scoring processes, started in the background at construction.

    A user's `module:function` is looked up in `working_dir` (None: the current folder) and on the driver's own
    `sys.path`; `function` is the verifier itself, where Python code passed it as an object. Inputs whose score is
    UNKNOWN are appended to `unknown_path`, if given: docs/run-folder.md. `max_response_length` is what
    `config.overlong_buffer` counts back from. Safe to call from several threads.
    """

    def __init__(
        self,
        config: RewardConfig,
        working_dir: str | None = None,
        unknown_path: Path | None = None,
        *,
        max_response_length: int | None = None,
        function: "RewardFn | None" = None,
    ) -> None:
        self._config = config
        self._unknown_path = unknown_path
        folder = os.path.abspath(working_dir or os.getcwd())
        if not os.path.isdir(folder):
            raise RewardError(f"working_dir {folder!r} is not a folder")
        if config.overlong_buffer is not None and max_response_length is None:
            raise ValueError("reward.overlong_buffer needs max_response_length")
        self._max_response_length = max_response_length or 0
        self._verifier, *self._shaping = sources(config, function)
        self._pool = ProcessPool(config, [self._verifier, *self._shaping], folder)
        # On demonstrations, by prompt id, text and part: places change where others are dropped.
        self._verdicts: dict[tuple[str, str, int], Score] = {}

    def __enter__(self) -> "ProcessScorer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_ready(self) -> None:
        """Block until every process has imported the functions of the recipe.

        Raises ConfigError at the field that names one which cannot be imported, RewardError when that takes more than
        60 s or kills the process. `score` raises the same; this only makes it early.
        """
        self._pool.wait_ready()

    def score(
        self,
        requests: Sequence[RolloutRequest],
        rollouts: Iterable[Rollout],
        earlier: Sequence[RolloutGroup] = (),
        *,
        num_groups: int | None = None,
    ) -> list[RolloutGroup]:
        """Score each rollout's text as it arrives; return when all of them are scored. See contracts.Scorer.

        Raises RewardError when rollouts are missing or unasked for, when more than `config.max_unknown_fraction`
        of the scores (and at least two), those of `earlier` groups included, are UNKNOWN, or when no process can be
        started; ConfigError when a reward function cannot be found. Errors of the iterator pass through.
        """
        groups = ExpectedGroups(requests)
        call = _Call(self._pool)
        lengths: dict[Key, int] = {}
        try:
            for rollout in rollouts:
                call.check()
                prompt = groups.admit(rollout)
                key = (rollout.prompt_id, rollout.index)
                lengths[key] = len(rollout.token_ids)
                for part in range(1 + len(self._shaping)):
                    self._submit(call, (*key, part), prompt, groups.pickled(prompt), rollout.text)
            groups.check_complete(num_groups)
            call.wait()
        finally:
            unknown = call.abandon()
            texts = {key: groups.rollout(key[:2]).text for key in unknown}
            self._write(unknown, call, texts, "index")
        scores = {key: self._combined(key, call.scores, length) for key, length in lengths.items()}
        self._check_budget([*scores.values(), *(s for g in earlier for s in g.scores)])
        return groups.grouped(scores)

    def grade(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The same prompts, every demonstration with a score: its own, or the verdict on its whole text; and shaping.

        Known verdicts are kept by prompt id and text, UNKNOWN ones are asked for again the next time. Raises as
        `score` does, but demonstrations have no budget of UNKNOWN.
        """
        call = _Call(self._pool)
        texts: dict[PartKey, str] = {}
        known: dict[PartKey, Score] = {}
        try:
            for prompt in prompts:
                data: bytes | None = None
                for i, demonstration in enumerate(prompt.demonstrations):
                    if demonstration.score is not None:
                        known[prompt.prompt_id, i, 0] = demonstration.score
                    for part in range(1 + len(self._shaping)):
                        key = (prompt.prompt_id, i, part)
                        if key in known or key in texts:
                            continue
                        verdict = self._verdicts.get((prompt.prompt_id, demonstration.text, part))
                        if verdict is not None:
                            known[key] = verdict
                            continue
                        texts[key] = demonstration.text
                        data = data or pickled(prompt)
                        self._submit(call, key, prompt, data, demonstration.text)
            call.wait()
        finally:
            unknown = call.abandon()
            self._write(unknown, call, texts, "demonstration")
        for key, score in call.scores.items():
            if score.reward is not None:
                self._verdicts[key[0], texts[key], key[2]] = score
        found = {**call.scores, **known}
        return [self._with_scores(prompt, found) for prompt in prompts]

    def close(self) -> None:
        """Kill all processes and wait for them; a call of `score` still under way raises RewardError."""
        self._pool.close()

    def _with_scores(self, prompt: Prompt, found: Mapping[PartKey, Score]) -> Prompt:
        demonstrations = tuple(
            replace(d, score=self._combined((prompt.prompt_id, i), found, len(d.token_ids)))
            for i, d in enumerate(prompt.demonstrations)
        )
        return replace(prompt, demonstrations=demonstrations)

    def _combined(self, key: Key, found: Mapping[PartKey, Score], length: int) -> Score:
        """The verdict, with the shaping of a response of `length` tokens."""
        verdict, config = found[*key, 0], self._config
        extra: dict[str, float] = {}
        if config.overlong_buffer is not None:
            limit, buffer = self._max_response_length, config.overlong_buffer
            extra[OVERLONG] = overlong_penalty(length, limit, buffer, config.overlong_penalty)
        if not (extra or config.shaping):
            return verdict
        parts = [(c, found[*key, n]) for n, c in enumerate(config.shaping, start=1)]
        return shaped(verdict, parts, extra)

    def _submit(
        self, call: "_Call", key: PartKey, prompt: Prompt, data: bytes, completion: str
    ) -> None:
        """`data`: the prompt, pickled."""
        source = [self._verifier, *self._shaping][key[2]]
        if key[2] == 0 and prompt.reward and prompt.reward != self._config.function:
            source = RewardSource(prompt.reward, f"prompts[{prompt.prompt_id!r}].reward")
        call.submit(key, source=source, prompt=data, completion=completion)

    def _write(
        self,
        unknown: Mapping[PartKey, Score],
        call: "_Call",
        texts: Mapping[PartKey, str],
        kind: Literal["index", "demonstration"],
    ) -> None:
        """Keep the inputs of UNKNOWN scores for replay; `kind` names the number of the rollout or demonstration."""
        if self._unknown_path is None or not unknown:
            return
        self._unknown_path.parent.mkdir(parents=True, exist_ok=True)
        with self._unknown_path.open("a", encoding="utf-8") as file:
            for key, score in unknown.items():
                record = {
                    "prompt_id": key[0],
                    kind: key[1],
                    "completion": texts[key],
                    "reward": call.sources[key].name,
                    "reason": score.reason,
                }
                file.write(json.dumps(record) + "\n")

    def _check_budget(self, scores: Sequence[Score]) -> None:
        allowed, total = self._config.max_unknown_fraction, len(scores)
        unknown = [score for score in scores if score.reward is None]
        if len(unknown) < 2 or len(unknown) <= allowed * total:
            return
        reasons = Counter(score.reason for score in unknown).most_common(3)
        summary = "; ".join(f"{count} x {reason}" for reason, count in reasons)
        kept = f"; their inputs are in {self._unknown_path}" if self._unknown_path else ""
        raise RewardError(
            f"{len(unknown)} of {total} scores are UNKNOWN, more than reward.max_unknown_fraction = {allowed:g} "
            f"allows: {summary}{kept}. Correct the reward function or the data, or raise reward.timeout_seconds, "
            "reward.max_memory_mib or reward.max_unknown_fraction"
        )


def sources(config: RewardConfig, function: "RewardFn | None" = None) -> list[RewardSource]:
    """The verifier, then the shaping functions, in the recipe's order."""
    data = None if function is None else cloudpickle.dumps(function)
    found = [RewardSource(config.function, "reward.function", json.dumps(config.options), data)]
    for i, part in enumerate(config.shaping):
        path = f"reward.shaping[{i}].function"
        found.append(RewardSource(part.function, path, json.dumps(part.options)))
    return found


class _Call:
    """One call of `score` or `grade`: what was submitted and what came back."""

    def __init__(self, pool: ProcessPool) -> None:
        self.scores: dict[PartKey, Score] = {}
        self.sources: dict[PartKey, RewardSource] = {}
        self._pool = pool
        self._failure: PlaitError | None = None
        self._abandoned = False
        self._changed = threading.Condition()

    def submit(self, key: PartKey, *, source: RewardSource, prompt: bytes, completion: str) -> None:
        self.sources[key] = source
        done = partial(self._finish, key)
        wanted = self._is_wanted
        self._pool.submit(Job(source, prompt, completion, done, self._fail, wanted))

    def check(self) -> None:
        """Raise what makes waiting pointless."""
        if self._failure is not None:
            raise self._failure
        self._pool.check()

    def wait(self) -> None:
        with self._changed:
            while len(self.scores) < len(self.sources):
                self.check()
                self._changed.wait(_CHECK_SECONDS)

    def abandon(self) -> dict[PartKey, Score]:
        """Take no more scores; returns the UNKNOWN ones."""
        with self._changed:
            self._abandoned = True
            return {key: score for key, score in self.scores.items() if score.reward is None}

    def _is_wanted(self) -> bool:
        return not self._abandoned

    def _finish(self, key: PartKey, score: Score) -> None:
        with self._changed:
            if not self._abandoned:
                self.scores[key] = score
                if len(self.scores) == len(
                    self.sources
                ):  # waking up for each would cost the processes their cores
                    self._changed.notify()

    def _fail(self, error: PlaitError) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify()
