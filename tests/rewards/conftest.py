"""Prompts, rollouts and scorers for the tests of rewards."""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from plait.engine.types import Prompt, Rollout, RolloutRequest, Sampling, Score
from plait.rewards.config import RewardConfig
from plait.rewards.scorer import ProcessScorer

MakeScorer = Callable[..., ProcessScorer]


def make_prompt(prompt_id: str = "p", answer: str | None = "4", **fields) -> Prompt:
    return Prompt(
        prompt_id, ({"role": "user", "content": "2+2?"},), (1, 2), answer=answer, **fields
    )


def make_rollout(prompt_id: str, index: int, text: str) -> Rollout:
    return Rollout(prompt_id, index, (3, 4), 0, (-0.1, -0.2), 0, "stop", text)


def score_texts(
    scorer: ProcessScorer, texts: Sequence[str], prompt: Prompt | None = None
) -> tuple[Score, ...]:
    """Scores of several completions of one prompt, in order."""
    prompt = prompt or make_prompt()
    rollouts = [make_rollout(prompt.prompt_id, i, text) for i, text in enumerate(texts)]
    request = RolloutRequest(prompt, len(texts), Sampling(max_tokens=8))
    (group,) = scorer.score([request], rollouts)
    assert [rollout.text for rollout in group.rollouts] == list(texts)
    return group.scores


@pytest.fixture
def make_scorer(tmp_path: Path) -> Iterator[MakeScorer]:
    """make_scorer(function, code=..., **config): `code` becomes user_rewards.py in the scorer's folder."""
    scorers: list[ProcessScorer] = []

    def make(
        function: str, code: str = "", unknown_path: Path | None = None, **config
    ) -> ProcessScorer:
        (tmp_path / "user_rewards.py").write_text(textwrap.dedent(code))
        settings = {"num_workers": 2, "max_unknown_fraction": 1.0, **config}
        config_ = RewardConfig(function=function, **settings)
        scorers.append(ProcessScorer(config_, str(tmp_path), unknown_path))
        return scorers[-1]

    yield make
    for scorer in scorers:
        scorer.close()
