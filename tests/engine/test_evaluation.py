"""Accuracy, its interval, and pass@k against closed forms and simulation."""

from itertools import combinations

import numpy as np
import pytest

from plait.engine.evaluation import (
    accuracy_interval,
    evaluate_groups,
    pass_at_k,
    pass_at_powers,
    wilson_interval,
)

from .test_metrics import group


def test_accuracy_is_over_known_scores():
    result = evaluate_groups([group(1.0, None), group(0.0, 1.0)])
    assert result.accuracy == pytest.approx(2 / 3)
    assert (result.num_scored, result.num_unknown, result.num_prompts) == (3, 1, 2)
    assert result.low < 2 / 3 < result.high


def test_an_evaluation_without_any_score_is_an_error():
    with pytest.raises(ValueError, match="no known score"):
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
