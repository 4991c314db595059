"""Accuracy, its interval, pass@k and maj@k against closed forms and simulation; by data set and difficulty."""

import json
from dataclasses import asdict, replace
from itertools import combinations, product
from math import comb

import numpy as np
import pytest

from plait.engine.errors import RewardError
from plait.engine.evaluation import (
    EvalResult,
    accuracy_interval,
    difficulty_levels,
    evaluate_groups,
    flat_result,
    majority,
    pass_at_k,
    pass_at_powers,
    wilson_interval,
)
from plait.engine.types import Prompt
from plait.launch.evaluate import show

from .test_metrics import PROMPT, group


def test_accuracy_is_over_known_scores():
    result = evaluate_groups([group(1.0, None), group(0.0, 1.0)])
    assert result.accuracy == pytest.approx(2 / 3)
    assert (result.num_scored, result.num_unknown, result.num_prompts) == (3, 1, 2)
    assert result.low < 2 / 3 < result.high


def test_an_evaluation_without_any_score_is_an_error():
    with pytest.raises(RewardError, match=r"no known score, all 1 are UNKNOWN: 1 x "):
        evaluate_groups([group(None)])


def test_wilson_interval_is_the_textbook_one():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10)[0] == 0


@pytest.mark.parametrize(("n", "right"), [(1, 0), (1, 1), (4, 1), (5, 3), (6, 6), (6, 0)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int, right: int) -> None:
    outcomes = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        subsets = list(combinations(outcomes, k))
        assert pass_at_k(n, right, k) == pytest.approx(np.mean([any(s) for s in subsets]))


def test_pass_at_k_of_planted_rollouts() -> None:
    result = evaluate_groups([group(1.0, 0.0, 0.0, 0.0), group(1.0, 1.0, None, 0.0), group(None)])
    # One of four; two of three, which is too few for pass@4.
    assert result.pass_at == pytest.approx(
        {"1": (1 / 4 + 2 / 3) / 2, "2": (1 / 2 + 1.0) / 2, "4": 1.0}
    )
    assert pass_at_powers([(1, 1), (1, 0)]) == {}


def test_the_interval_knows_that_rollouts_of_a_prompt_agree() -> None:
    one = [(1, 1)] * 60 + [(1, 0)] * 40
    copied = [(8, 8)] * 60 + [(8, 0)] * 40
    assert accuracy_interval(one) == wilson_interval(60, 100)
    low, high = accuracy_interval(copied)
    assert high - low == pytest.approx(
        wilson_interval(60, 100)[1] - wilson_interval(60, 100)[0], rel=0.05
    )
    assert accuracy_interval([(8, 8)] * 10) == wilson_interval(10, 10)
    assert accuracy_interval([(8, 4)]) == (0.0, 1.0)


def test_the_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        chances = rng.beta(1.0, 1.0, size=60)
        low, high = accuracy_interval([(4, int(rng.binomial(4, p))) for p in chances])
        covered.append(low <= 0.5 <= high)
    assert 0.91 < np.mean(covered) < 0.98


def voted(*answers, prompt=PROMPT):
    """A group whose right answer is "4"; None is UNKNOWN, "" names no answer."""
    found = group(*(None if a is None else float(a == "4") for a in answers), prompt=prompt)
    scores = tuple(
        s if a is None else replace(s, answer=a) for s, a in zip(found.scores, answers, strict=True)
    )
    return replace(found, scores=scores)


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        (("4", "4", "5"), True),
        (("5", "4", "5"), False),
        (("4", "5"), True),
        (("5", "4"), False),  # the first one of equals
        (("", "", "4"), True),  # who names no answer has no vote
        (("", ""), False),
        ((None, None, None, "4"), True),
        (("5", "5", None, None, "4"), False),
        ((None, None), None),
    ],
)
def test_majority(answers, right) -> None:
    assert majority(voted(*answers).scores) is right


def test_majority_of_planted_rollouts() -> None:
    groups = [
        voted("4", "4", "5", "4"),
        voted("5", "4", "5", "6"),
        voted("4", None, None, None),
        group(1.0, 1.0, 1.0, 1.0),  # its reward tells no answer
    ]
    result = evaluate_groups(groups)
    assert result.num_voted == 3
    assert result.maj_at == pytest.approx(
        {
            "1": (3 / 4 + 1 / 4 + 1) / 3,
            # Blocks 44|54, 54|56, 4?|??: the second of the last prompt has no known score.
            "2": (1 / 2 + 0 + 1) / 3,
            "4": (1 + 0 + 1) / 3,
        }
    )
    assert evaluate_groups([voted("4"), voted("5")]).maj_at == {}


@pytest.mark.parametrize("p", [0.3, 0.6])
def test_majority_has_its_closed_form_in_expectation(p: float) -> None:
    """All outcomes of three rollouts with two answers, weighed by their chance."""
    expected = sum(comb(3, r) * p**r * (1 - p) ** (3 - r) for r in (2, 3))
    found = sum(
        bool(majority(voted(*answers).scores)) * p ** answers.count("4") * (1 - p) ** answers.count("5")
        for answers in product("45", repeat=3)
    )  # fmt: skip
    assert found == pytest.approx(expected)


def of(part: str, number: int, difficulty: float | None = None) -> Prompt:
    return replace(PROMPT, prompt_id=f"{part}/{number}", part=part, difficulty=difficulty)


def test_each_set_has_numbers_of_its_own() -> None:
    groups = [
        group(1.0, 0.0, prompt=of("a", 0)),
        group(1.0, 1.0, prompt=of("a", 1)),
        group(0.0, None, prompt=of("", 0)),
        group(None, None, prompt=of("b", 0)),
    ]
    result = evaluate_groups(groups)
    assert result.accuracy == pytest.approx(3 / 5)
    assert list(result.sets) == ["a", "b", "held_out"]
    assert result.sets["a"] == {
        name: value
        for name, value in asdict(evaluate_groups([group(1.0, 0.0), group(1.0, 1.0)])).items()
        if name not in ("sets", "difficulties")
    }
    assert result.sets["held_out"]["accuracy"] == 0.0
    assert result.sets["b"] == {"num_prompts": 1, "num_scored": 0, "num_unknown": 2}, (
        "absent, not 0"
    )
    metrics = flat_result(asdict(result))
    assert metrics["set/a/pass@2"] == 1.0
    assert metrics["set/b/num_unknown"] == 2
    assert "set/b/accuracy" not in metrics
    assert all(isinstance(value, int | float) for value in metrics.values())
    assert EvalResult(**json.loads(json.dumps(asdict(result)))) == result
    assert evaluate_groups([group(1.0)]).sets == {}


def test_difficulties_are_levels_or_quarters() -> None:
    few = [of("", i, difficulty=i % 3) for i in range(9)]
    assert {difficulty_levels(few)[p.prompt_id] for p in few} == {"0", "1", "2"}
    many = [of("a", i, difficulty=i / 10) for i in range(100)]
    labels = [difficulty_levels(many)[p.prompt_id] for p in many]
    assert sorted(set(labels)) == ["a/0..2.4", "a/2.5..4.9", "a/5..7.4", "a/7.5..9.9"]
    assert {labels.count(label) for label in labels} == {25}
    assert difficulty_levels([of("", 0, 1.0), of("", 1, 1.0), of("", 2)]) == {}
    skewed = [of("", i, difficulty=max(0, i - 80)) for i in range(100)]
    counted = difficulty_levels(skewed)
    assert len(counted) == 100, "every prompt has a place, however the values lie"


def test_accuracy_by_difficulty() -> None:
    groups = [group(float(i < 3), prompt=of("", i, difficulty=i // 3)) for i in range(6)]
    found = evaluate_groups(groups).difficulties
    assert {name: mine["accuracy"] for name, mine in found.items()} == {"0": 1.0, "1": 0.0}
    assert (found["0"]["low"], found["0"]["high"]) == wilson_interval(3, 3)


def test_the_table_shows_every_set_and_difficulty(capsys) -> None:
    groups = [
        voted("4", "4", prompt=of("gsm8k", 0, difficulty=1)),
        voted("5", "4", prompt=of("gsm8k", 1, difficulty=2)),
        group(0.0, 0.0, prompt=of("", 0)),
        replace(group(None, None), prompt=of("silent", 0)),
    ]
    show(asdict(evaluate_groups(groups)))
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[0].strip(): line.split() for line in lines}
    assert rows["all"][1:5] == ["4", "6", "2", "0.500"]
    assert rows["gsm8k"][1:5] == ["2", "4", "0", "0.750"]
    assert rows["gsm8k"][-2:] == ["1.000", "0.500"], "pass@2, maj@2"
    assert rows["held_out"][4] == "0.000"
    assert rows["silent"][1:] == ["1", "0", "2", "-", "-", "-", "-"]
    assert rows["difficulty gsm8k/2"][2:6] == ["1", "2", "0", "0.500"]
    assert any("over 2 of 4 prompts" in line for line in lines)
