"""Shaping is added for training and leaves the verdict alone; options and functions reach the scoring processes."""

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from plait.engine.errors import ConfigError
from plait.engine.types import Demonstration, RolloutRequest, Sampling, Score
from plait.rewards import resolve
from plait.rewards.config import RewardConfig, ShapingConfig
from plait.rewards.scorer import ProcessScorer
from plait.rewards.shaping import overlong_penalty, shaped

from .conftest import MakeScorer, make_prompt, make_rollout, score_texts

CODE = """
    def right(prompt, completion):
        return float(prompt.answer in completion)
    def brief(prompt, completion, *, limit=5):
        return None if completion == "?" else float(len(completion) <= limit)
    async def shout(prompt, completion):
        return float(completion.isupper())
"""
BRIEF = {"function": "user_rewards:brief", "weight": 0.5, "options": {"limit": 3}}
SHOUT = {"function": "user_rewards:shout", "weight": -2.0}


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0.0), (16, 0.0), (17, -0.25), (18, -0.5), (20, -1.0), (25, -1.0)]
)
def test_soft_overlong_punishment_is_dapos(length: int, expected: float) -> None:
    """Equation 13: 0, ((L_max - L_cache) - |y|) / L_cache, -1; here L_max 20, L_cache 4."""
    assert overlong_penalty(length, max_length=20, buffer=4) == pytest.approx(expected)
    assert overlong_penalty(length, 20, 4, penalty=0.5) == pytest.approx(expected / 2)


def test_weighted_parts_shape_and_the_verdict_stays(make_scorer: MakeScorer) -> None:
    scorer = make_scorer("user_rewards:right", CODE, shaping=[BRIEF, SHOUT])
    brief, shout, wrong = score_texts(scorer, ["4", "4 IS IT", "five"])
    assert (brief.reward, brief.shaping) == (1.0, 0.5)
    assert (shout.reward, shout.shaping) == (1.0, -2.0)
    assert (wrong.reward, wrong.shaping) == (0.0, 0.0)
    assert shout.parts == {"user_rewards:brief": 0.0, "user_rewards:shout": 1.0}


def test_an_unknown_part_makes_the_score_unknown(make_scorer: MakeScorer, tmp_path: Path) -> None:
    kept = tmp_path / "unknown.jsonl"
    scorer = make_scorer("user_rewards:right", CODE, kept, shaping=[BRIEF])
    (score,) = score_texts(scorer, ["?"])
    assert score.reward is None
    assert score.reason == "shaping user_rewards:brief: returned None"
    assert '"reward": "user_rewards:brief"' in kept.read_text()


def test_unknown_verdicts_stay_unknown() -> None:
    config = ShapingConfig(function="f", weight=1.0)
    verdict = Score.unknown("deadline")
    assert shaped(verdict, [(config, Score.ok(1.0))], {}) is verdict


def test_long_responses_and_demonstrations_pay(tmp_path: Path) -> None:
    config = RewardConfig(function="exact", overlong_buffer=4)
    demonstrations = (
        Demonstration(tuple(range(9)), "4"),
        Demonstration(tuple(range(2)), "5", score=Score.ok(1.0)),
    )
    prompt = make_prompt(demonstrations=demonstrations)
    short = make_rollout("p", 0, "4")
    long = replace(make_rollout("p", 1, "4"), token_ids=tuple(range(9)))
    with ProcessScorer(config, str(tmp_path), max_response_length=10) as scorer:
        request = RolloutRequest(prompt, 2, Sampling(max_tokens=10))
        (group,) = scorer.score([request], [short, long])
        (graded,) = scorer.grade([prompt])
    assert [(s.reward, s.shaping) for s in group.scores] == [(1.0, 0.0), (1.0, -0.75)]
    assert group.scores[1].parts == {"overlong": -0.75}
    scores = [d.score for d in graded.demonstrations]
    assert [(s.reward, s.shaping) for s in scores if s] == [(1.0, -0.75), (1.0, 0.0)]


def test_a_function_of_python_code_scores(tmp_path: Path) -> None:
    wanted = "closure"
    config = RewardConfig(function="passed as an object")
    with ProcessScorer(
        config, str(tmp_path), function=lambda prompt, text: text == wanted
    ) as scorer:
        scores = score_texts(scorer, ["closure", "other"])
    assert [score.reward for score in scores] == [1.0, 0.0]


def test_options_that_a_function_does_not_take_name_their_field(
    make_scorer: MakeScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = {**BRIEF, "options": {"limits": 3}}
    scorer = make_scorer("user_rewards:right", CODE, shaping=[part])
    with pytest.raises(ConfigError, match=r"reward\.shaping\[0\]\.function.*'limits'"):
        scorer.wait_ready()
    with pytest.raises(ConfigError, match=r"reward\.function.*'tolerance'"):
        resolve("exact", options={"tolerance": 1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shaping": [{"function": "exact", "weight": 1}]}, "'exact' is named twice"),
        ({"options": {"a": float("nan")}}, "options must be plain data"),
        ({"overlong_buffer": 0}, "greater than or equal to 1"),
    ],
)
def test_what_the_section_refuses(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RewardConfig(function="exact", **fields)
