"""The gold test: a verifier must call its own gold answers right and corrupted ones wrong.

A gold completion is the prompt's answer in one of the `FORMS`, or its demonstration, whichever the verifier takes; a
corrupted one is the same text with another answer in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

from ..engine.evaluation import SUCCESS
from ..engine.types import Prompt, Rollout, RolloutRequest, Sampling, Score
from .scorer import ProcessScorer

FORMS = (
    "{answer}",
    "\\boxed{{answer}}",
    "<answer>{answer}</answer>",
    "The answer is {answer}.",
    "#### {answer}",
)
DEMONSTRATION = "demonstration"
SHOWN = 3
_GIVE_UP_AFTER = 5
_OPPOSITES = {"true": "False", "false": "True", "yes": "no", "no": "yes"}


@dataclass(frozen=True)
class Verdict:
    """How the verifier judged one completion whose quality is known."""

    prompt_id: str
    completion: str
    score: Score
    seconds: float

    @property
    def right(self) -> bool:
        return self.score.reward is not None and self.score.reward >= SUCCESS

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_id": self.prompt_id,
            "completion": self.completion,
            "reward": self.score.reward,
            "reason": self.score.reason,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        score = self.score
        verdict = f"UNKNOWN ({score.reason})" if score.reward is None else f"{score.reward:g}"
        text = self.completion if len(self.completion) <= 60 else f"...{self.completion[-57:]}"
        return f"{self.prompt_id}: {text!r} scores {verdict}"


@dataclass(frozen=True)
class GoldReport:
    """`gold` and `corrupted` are empty where no prompt has an answer or a demonstration."""

    form: str
    gold: Sequence[Verdict] = field(default=())
    corrupted: Sequence[Verdict] = field(default=())

    @property
    def missed(self) -> list[Verdict]:
        """Gold completions that are not right."""
        return [v for v in self.gold if not v.right]

    @property
    def fooled(self) -> list[Verdict]:
        """Corrupted completions that are right, or of which nothing is known."""
        return [v for v in self.corrupted if v.right or v.score.reward is None]

    def passes(self, max_failures: float) -> bool:
        """Whether at most this share of each kind failed."""
        return all(
            len(failed) <= max_failures * len(all_of)
            for failed, all_of in ((self.missed, self.gold), (self.fooled, self.corrupted))
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "gold": [v.to_json() for v in self.gold],
            "corrupted": [v.to_json() for v in self.corrupted],
        }

    def lines(self) -> list[str]:
        if not self.gold:
            return ["gold test: no prompt has an answer or a demonstration, nothing to test"]
        seconds = [v.seconds for v in (*self.gold, *self.corrupted)]
        lines = [
            f"gold test, answers given as {self.form!r}: {len(self.gold) - len(self.missed)} of {len(self.gold)} gold "
            f"answers right, {len(self.corrupted) - len(self.fooled)} of {len(self.corrupted)} corrupted ones wrong; "
            f"{1000 * median(seconds):.1f} ms each, at most {1000 * max(seconds):.1f} ms"
        ]
        for name, failed in (("gold", self.missed), ("corrupted", self.fooled)):
            lines += [f"  {name}: {verdict}" for verdict in failed[:SHOWN]]
            if len(failed) > SHOWN:
                lines.append(f"  {name}: and {len(failed) - SHOWN} more")
        return lines


def run_gold_test(scorer: ProcessScorer, prompts: Sequence[Prompt]) -> GoldReport:
    """Grade gold and corrupted completions of `prompts`, one after the other.

    Raises what `ProcessScorer.score` raises.
    """
    best = GoldReport(FORMS[0])
    for form in (*FORMS, DEMONSTRATION):
        gold = list(_grade(scorer, prompts, lambda p, form=form: gold_completion(p, form)))
        report = GoldReport(form, gold)
        if not best.gold or sum(v.right for v in gold) > sum(v.right for v in best.gold):
            best = report
        if gold and not report.missed:
            break
    others = _Others(prompts)
    corrupted = _grade(scorer, prompts, lambda p: others.corrupted(p, best.form))
    return GoldReport(best.form, best.gold, list(corrupted))


def gold_completion(prompt: Prompt, form: str) -> str | None:
    """None where the prompt has no such thing."""
    if form == DEMONSTRATION:
        return prompt.demonstrations[0].text if prompt.demonstrations else None
    return None if prompt.answer is None else form.replace("{answer}", prompt.answer)


class _Others:
    """Answers and demonstrations of other prompts, where a text has no obvious neighbour."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._answers = list(dict.fromkeys(p.answer for p in prompts if p.answer is not None))
        self._texts = list(
            dict.fromkeys(p.demonstrations[0].text for p in prompts if p.demonstrations)
        )

    def corrupted(self, prompt: Prompt, form: str) -> str | None:
        gold = gold_completion(prompt, form)
        if gold is None:
            return None
        if prompt.answer is None:
            return next((text for text in self._texts if text != gold), None)
        wrong = corrupt_answer(prompt.answer, self._answers)
        if form != DEMONSTRATION:
            return form.replace("{answer}", wrong)
        whole = rf"(?<!\w){re.escape(prompt.answer)}(?!\w)"
        text = re.sub(whole, lambda _: wrong, gold)
        return None if text == gold else text


def corrupt_answer(answer: str, others: Iterable[str] = ()) -> str:
    """Another answer of the same kind: the last number plus one, the next letter, the opposite, or one of `others`.

    >>> [corrupt_answer(a) for a in ("12", "3/4", "B", "yes", "-0.5")]
    ['13', '3/5', 'C', 'no', '-1.5']
    """
    text = answer.strip()
    if number := list(re.finditer(r"\d+", text)):
        digits = number[-1]
        if text[: digits.start()].endswith((".", ",")) and len(number) > 1:
            digits = number[-2]  # of 0.5, the 0
        return text[: digits.start()] + str(int(digits[0]) + 1) + text[digits.end() :]
    if text.lower() in _OPPOSITES:
        return _OPPOSITES[text.lower()]
    if re.fullmatch(r"\(?[A-Ia-i]\)?", text):
        return re.sub(r"[A-Ia-i]", lambda m: chr(ord(m[0]) + 1), text)
    other = next((o for o in others if o.strip().lower() != text.lower()), None)
    return other if other is not None else f"not {text}"


def _grade(
    scorer: ProcessScorer, prompts: Sequence[Prompt], completion: Callable[[Prompt], str | None]
) -> Iterable[Verdict]:
    """One verdict a prompt that has a completion; ends early when the first ones are all UNKNOWN."""
    unknown = done = 0
    for prompt in prompts:
        text = completion(prompt)
        if text is None:
            continue
        if unknown == done == _GIVE_UP_AFTER:
            return
        started = perf_counter()
        rollout = Rollout(prompt.prompt_id, 0, (), 0, (), 0, "stop", text)
        (group,) = scorer.score([RolloutRequest(prompt, 1, Sampling(max_tokens=1))], [rollout])
        done += 1
        unknown += group.scores[0].reward is None
        yield Verdict(prompt.prompt_id, text, group.scores[0], perf_counter() - started)
