"""`plait teach`: sample solutions from a teacher and keep verified ones as demonstrations.

The teacher is a local model behind the rollout workers, or an endpoint. Prompts are asked in batches; one without a
right answer can be asked again with the beginning of its demonstration shown (ReGFT, arXiv 2603.01223). A killed run
goes on where it was (collect.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.errors import ConfigError
from ..engine.evaluation import SUCCESS
from ..engine.types import Prompt, Rollout, RolloutGroup, RolloutRequest, Score
from .collect import RowFiles, Sampler, batches, open_model
from .model import resolve_model
from .run import check_inputs, load_prompts
from .run_lock import lock_run
from .sampled_settings import Row, sampling_settings
from .scoring import open_scorer
from .secret_keys import secrets_in

if TYPE_CHECKING:
    from ..rewards.scorer import ProcessScorer
    from ..rollouts.data import Data
    from .config import Recipe

DEMONSTRATIONS, UNSOLVED, SETTINGS = "demonstrations.jsonl", "unsolved.jsonl", "teach.json"


@dataclass(frozen=True)
class Teaching:
    """What a person chooses; everything else is the recipe's."""

    teacher: str
    """A model as in the recipe, or the name of a model behind `endpoint`."""
    rollouts_per_prompt: int = 4
    max_kept: int = 1
    """Different right answers kept of a prompt, in order."""
    hint_fraction: float = 0.0
    """Share of the demonstration shown in a second round to prompts without a right answer; 0: no second round."""
    max_prompts: int | None = None
    endpoint: str | None = None
    api_key_env: str | None = None


@dataclass(frozen=True)
class Trace:
    """A verified answer."""

    rollout: Rollout
    score: Score
    hinted: bool


@dataclass
class Totals:
    prompts: int = 0
    solved: int = 0
    solved_with_hint: int = 0
    traces: int = 0
    unknown: int = 0

    def count(self, row: Row) -> None:
        hinted = row.get("hinted", [])
        self.prompts += 1
        self.solved += bool(hinted)
        self.solved_with_hint += any(hinted)
        self.traces += len(hinted)
        self.unknown += row["unknown"]


def teach(
    recipe: Recipe, teaching: Teaching, folder: Path, say: Callable[[str], None] = print
) -> Totals:
    """Work through the training prompts that `folder` does not hold yet; the totals are of the whole folder.

    Raises ConfigError where the folder holds traces of other settings, RunInUse where another process adds to it,
    and what sampling and scoring raise.
    """
    if problems := list(secrets_in(teaching.endpoint, "--endpoint")):
        raise ConfigError(problems)  # it is written down with the traces
    inputs = check_inputs(recipe)
    totals, names = Totals(), (DEMONSTRATIONS, UNSOLVED)
    with ExitStack() as stack:
        stack.enter_context(lock_run(folder))
        files = RowFiles(folder, names, SETTINGS, settings(recipe, teaching), totals.count)
        scorer = open_scorer(recipe, folder)
        stack.callback(scorer.close)
        teacher, model_path = stack.enter_context(open_teacher(recipe, teaching))
        data = load_prompts(inputs, model_path)
        teacher.wait_started(stop_token_ids=[data.end_token_id])
        count, todo = files.left(data, teaching.max_prompts)
        say(f"{count} prompts, {count - len(todo)} of them done before")
        session = Session(recipe, teaching, teacher, scorer, data, tokens_of(recipe, model_path))
        for batch in batches(todo):
            files.append(dict(zip(names, session.work(batch), strict=True)))
            say(
                f"{totals.prompts}/{count} prompts: {totals.solved} solved, {totals.solved_with_hint} of them with a "
                f"hint, {totals.traces} traces kept, {totals.unknown} scores unknown"
            )
    return totals


class Session:
    """One batch after the other: sample, score, keep."""

    def __init__(
        self,
        recipe: Recipe,
        teaching: Teaching,
        teacher: Sampler,
        scorer: ProcessScorer,
        data: Data,
        student_tokens: Callable[[Prompt, str], list[int]],
    ) -> None:
        self.recipe, self.teaching, self.teacher = recipe, teaching, teacher
        self.scorer, self.data, self.student_tokens = scorer, data, student_tokens

    def work(self, prompts: Sequence[Prompt]) -> tuple[list[Row], list[Row]]:
        """Rows of demonstrations and of unsolved prompts."""
        n = self.teaching.rollouts_per_prompt
        plain = self.sample([RolloutRequest(p, n, self.recipe.sampling) for p in prompts], 0)
        kept = {g.prompt.prompt_id: self.verified(g, hinted=False) for g in plain}
        hints = [self.with_hint(p) for p in prompts if not kept[p.prompt_id]]
        again = [RolloutRequest(p, n, self.recipe.sampling, first_index=n) for p in hints if p]
        hinted = self.sample(again, 1) if again else []
        kept |= {g.prompt.prompt_id: self.verified(g, hinted=True) for g in hinted}
        scores = {p.prompt_id: list[Score]() for p in prompts}
        for group in (*plain, *hinted):
            scores[group.prompt.prompt_id] += group.scores
        solved = [self.row(p, kept[p.prompt_id], scores) for p in prompts if kept[p.prompt_id]]
        return solved, [unsolved_row(p, scores) for p in prompts if not kept[p.prompt_id]]

    def sample(self, requests: Sequence[RolloutRequest], step: int) -> list[RolloutGroup]:
        return self.scorer.score(requests, self.teacher.generate(requests, step=step))

    def verified(self, group: RolloutGroup, *, hinted: bool) -> list[Trace]:
        """Different right answers that the teacher finished, in order."""
        found: dict[str, Trace] = {}
        for rollout, score in zip(group.rollouts, group.scores, strict=True):
            right = score.reward is not None and score.reward >= SUCCESS
            if right and rollout.finish_reason == "stop" and rollout.text.strip():
                found.setdefault(rollout.text, Trace(rollout, score, hinted))
        return [*found.values()][: self.teaching.max_kept]

    def with_hint(self, prompt: Prompt) -> Prompt | None:
        """The prompt with the beginning of its demonstration shown; None where there is nothing to show."""
        if not prompt.demonstrations:
            return None
        tokens = prompt.demonstrations[0].token_ids[:-1]
        hint = tokens[: int(self.teaching.hint_fraction * len(tokens))]
        return self.data.show_hint(prompt, hint) if hint else None

    def row(
        self, prompt: Prompt, traces: Sequence[Trace], scores: Mapping[str, Sequence[Score]]
    ) -> Mapping[str, Any]:
        """A line of the documented format, templates already applied."""
        row: dict[str, Any] = {
            "id": prompt.prompt_id,
            "messages": [dict(message) for message in prompt.messages],
            "demonstration": [trace.rollout.text for trace in traces],
            "demonstration_score": [trace.score.reward for trace in traces],
            "metadata": dict(prompt.metadata),
            "teacher": self.teaching.teacher,
            "hinted": [trace.hinted for trace in traces],
            "tried": len(scores[prompt.prompt_id]),
            "unknown": sum(s.reward is None for s in scores[prompt.prompt_id]),
        }
        if prompt.answer is not None:
            row["answer"] = prompt.answer
        if prompt.reward is not None:
            row["reward"] = prompt.reward
        logprobs = [self.logprobs(prompt, trace.rollout) for trace in traces]
        if all(values is not None for values in logprobs):
            row["behaviour_logprobs"] = logprobs
        return row

    def logprobs(self, prompt: Prompt, rollout: Rollout) -> list[float] | None:
        """The teacher's, where its tokens are those that the recipe's model makes of the text."""
        if not rollout.token_ids:
            return None
        same = self.student_tokens(prompt, rollout.text) == list(rollout.token_ids)
        return list(rollout.logprobs) if same else None


def unsolved_row(prompt: Prompt, scores: Mapping[str, Sequence[Score]]) -> Mapping[str, Any]:
    own = scores[prompt.prompt_id]
    return {
        "id": prompt.prompt_id,
        "tried": len(own),
        "unknown": sum(s.reward is None for s in own),
        "rewards": [s.reward for s in own],
    }


def settings(recipe: Recipe, teaching: Teaching) -> dict[str, Any]:
    """What traces depend on; more prompts may be added later."""
    chosen = asdict(teaching)
    del chosen["max_prompts"], chosen["api_key_env"]
    return {"teaching": chosen, **sampling_settings(recipe)}


@contextmanager
def open_teacher(recipe: Recipe, teaching: Teaching) -> Iterator[tuple[Sampler, str]]:
    """The teacher, and the model whose tokenizer and template the prompts are read with."""
    if teaching.endpoint is not None:
        from ..rollouts.endpoint import Endpoint

        yield (
            Endpoint(
                teaching.endpoint,
                teaching.teacher,
                api_key_env=teaching.api_key_env,
                max_concurrency=recipe.rollouts.max_num_seqs,
                timeout_seconds=recipe.rollouts.sample_timeout_seconds,
                seed=recipe.run.seed,
            ),
            resolve_model(recipe.model.path),
        )
        return
    with open_model(recipe, teaching.teacher) as opened:
        yield opened


def tokens_of(recipe: Recipe, teacher_path: str) -> Callable[[Prompt, str], list[int]]:
    """What the recipe's model makes of a prompt's answer; its template decides where the two meet."""
    from transformers import AutoTokenizer

    from ..rollouts.chat import ChatFormat

    path = resolve_model(recipe.model.path)
    chat = ChatFormat(AutoTokenizer.from_pretrained(path))

    def encode(prompt: Prompt, text: str) -> list[int]:
        known = path == teacher_path
        ids = prompt.token_ids if known else chat.encode_prompt(prompt.messages)
        return chat.encode_response(ids, text)

    return encode
