"""Methods with several rounds of rollouts: what they ask for after seeing scores, and which rows they make of it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from plait.algorithms import resolve
from plait.algorithms.bread import merge_pieces, search_anchor
from plait.engine.types import Prompt, RolloutRequest, Sampling, Source
from steps import PROMPTS, SETUP, assemble_rounds, make_prompt, run_rounds

DEMONSTRATION = PROMPTS[0].demonstrations[0].token_ids
BARE = make_prompt("bare", demonstrated=False)


def build(name: str, setup: Any = SETUP, **config: Any) -> Any:
    cls = resolve(name)
    values = {"type": name, "rollouts_per_prompt": 2, **config}
    return cls(cls.Config.model_validate(values), setup)


def prefixes(rounds: Any, name: str) -> list[int]:
    """Forced tokens of each request of a prompt."""
    return [len(r.prefix) for requests, _ in rounds for r in requests if r.prompt.prompt_id == name]


# -- ghpo --------------------------------------------------------------------------------------


def by_prefix(**rewards: Any) -> Any:
    """Rewards of a prompt's request: a list for all its requests, or a dictionary by prefix length."""

    def look_up(request: RolloutRequest) -> list[float | None]:
        given = rewards[request.prompt.prompt_id]
        one = given[len(request.prefix)] if isinstance(given, dict) else given
        return one * request.n if len(one) == 1 else one

    return look_up


def test_ghpo_hints_only_what_is_known_to_fail():
    algorithm = build("ghpo")
    rewards = by_prefix(a={0: [0], 2: [0], 4: [1, 0]}, b=[0, None], c=[0, 1], bare=[0, 0])
    prompts = [*PROMPTS, BARE]
    rounds = run_rounds(algorithm, prompts, rewards)
    assert prefixes(rounds, "a") == [0, 2, 4]
    assert [prefixes(rounds, name) for name in ("b", "c", "bare")] == [[0]] * 3
    assert rounds[1][0][0].prefix == DEMONSTRATION[:2]
    (update,) = assemble_rounds(algorithm, prompts, rounds)
    rows = [row for row in update.samples if row.group_id == "a"]
    assert [row.reward for row in rows] == [1, 0], "only the last stage trains"
    for row in rows:
        assert row.token_ids.tolist() == [1, 3, *DEMONSTRATION[:4], 11, 2]
        assert row.source.tolist() == [Source.CONTEXT] * 6 + [Source.POLICY] * 2
        assert row.rollout_logprobs[-2:].tolist() == pytest.approx([-0.1, -0.2])
        assert row.advantages[-1] != 0
    assert len([row for row in update.samples if row.group_id == "b"]) == 1, "UNKNOWN is left out"
    assert algorithm.metrics() == {
        "stage_0_share": 0.75,
        "stage_1_share": 0.0,
        "stage_2_share": 0.25,
        "stage_3_share": 0.0,
    }


def test_ghpo_keeps_the_last_stage_even_where_it_fails():
    algorithm = build("ghpo", hint_fractions=(0.5,))
    rounds = run_rounds(algorithm, PROMPTS[:1], by_prefix(a=[0]))
    assert prefixes(rounds, "a") == [0, 4]
    (update,) = assemble_rounds(algorithm, PROMPTS[:1], rounds)
    assert [len(row) for row in update.samples] == [8, 8]


def test_ghpo_waits_for_its_first_hinted_step():
    algorithm = build("ghpo", hint_start_step=5)
    assert len(run_rounds(algorithm, PROMPTS, by_prefix(a=[0], b=[0], c=[0]), step=4)) == 1
    assert len(run_rounds(algorithm, PROMPTS, by_prefix(a=[0], b=[0], c=[0]), step=5)) == 4


@pytest.mark.parametrize(("max_tokens", "longest"), [(12, 6), (4, 3), (1, 0)])
def test_ghpo_leaves_the_end_token_and_one_token_of_the_budget(max_tokens, longest):
    setup = replace(SETUP, sampling=Sampling(max_tokens))
    algorithm = build("ghpo", setup, hint_fractions=(1.0,))
    rounds = run_rounds(algorithm, PROMPTS[:1], by_prefix(a=[0]))
    assert prefixes(rounds, "a") == [0, longest]


@pytest.mark.parametrize("name", ["ghpo", "bread"])
def test_a_group_of_one_that_failed_is_rescued(name):
    algorithm = build(
        name, rollouts_per_prompt=1, **({"probe_rollouts": 1} if name == "bread" else {})
    )
    rounds = run_rounds(algorithm, PROMPTS[:1], lambda r: [float(len(r.prefix) > 2)])
    (update,) = assemble_rounds(algorithm, PROMPTS[:1], rounds)
    (row,) = update.samples
    assert row.reward == 1
    assert np.isfinite(row.advantages).all()
    assert row.advantages[-1] > 0, "a group of one row keeps its reward"


# -- bread -------------------------------------------------------------------------------------


def test_bread_draws_the_whole_group_from_the_anchor_it_finds():
    algorithm = build("bread", probe_rollouts=1)
    # 4 pieces: anchors of 0, 2, 3 and 5 tokens. 3 tokens fail, 5 always succeed.
    rewards = by_prefix(a={0: [0], 3: [0], 5: [1]}, b=[1, 0], c=[None, 0], bare=[0, 0])
    prompts = [*PROMPTS, BARE]
    rounds = run_rounds(algorithm, prompts, rewards)
    assert prefixes(rounds, "a") == [0, 3, 5, 5]
    assert [r.n for requests, _ in rounds for r in requests if r.prompt.prompt_id == "a"] == [
        2,
        1,
        1,
        2,
    ]
    assert [prefixes(rounds, name) for name in ("b", "c", "bare")] == [[0]] * 3
    (update,) = assemble_rounds(algorithm, prompts, rounds)
    rows = [row for row in update.samples if row.group_id == "a"]
    assert len(rows) == 2, "neither the failed group nor the probes train"
    for row in rows:
        assert row.source.tolist() == [0, 0, *[Source.EXPERT] * 5, 1, 1]
        assert row.weights.tolist() == [1, 1, 0, 0, 0, 0, 0, 1, 1]
    assert algorithm.metrics() == {"probes": 2, "anchored_share": 0.25, "prefix_share": 5 / 7}


def test_bread_stops_at_a_mixed_probe_and_gives_up_without_any_score():
    algorithm = build("bread", probe_rollouts=2)
    mixed = by_prefix(a={0: [0], 3: [0, 1]})
    assert prefixes(run_rounds(algorithm, PROMPTS[:1], mixed), "a") == [0, 3, 3]
    partly = by_prefix(a={0: [0], 3: [None, 1], 2: [0]})
    assert prefixes(run_rounds(algorithm, PROMPTS[:1], partly), "a") == [0, 3, 2, 3]
    rounds = run_rounds(algorithm, PROMPTS[:1], by_prefix(a={0: [0], 3: [None]}))
    assert prefixes(rounds, "a") == [0, 3]
    (update,) = assemble_rounds(algorithm, PROMPTS[:1], rounds)
    assert [len(row) for row in update.samples] == [4, 4], "its own rollouts"
    assert algorithm.metrics() == {"probes": 1, "anchored_share": 0}


def test_bread_forces_no_more_than_the_budget_allows():
    algorithm = build("bread", replace(SETUP, sampling=Sampling(4)), probe_rollouts=1)
    rounds = run_rounds(algorithm, PROMPTS[:1], by_prefix(a=[0]))
    assert prefixes(rounds, "a") == [0, 2, 3, 3], "the third piece ends with token 5"
    whole = build("bread", max_pieces=1)
    assert prefixes(run_rounds(whole, PROMPTS[:1], by_prefix(a=[0])), "a") == [0]


def test_pieces_are_merged_evenly_and_the_search_is_bounded():
    assert merge_pieces((2, 1, 2, 1), 16) == (2, 1, 2, 1)
    assert merge_pieces((2, 1, 2, 1), 2) == (3, 3)
    assert merge_pieces((1, 2, 3, 4, 5), 3) == (1, 5, 9)
    assert merge_pieces((), 3) == ()
    for num in range(1, 17):
        for rate in (0.0, 1.0):
            search = search_anchor([rate] * 20, num)
            assert len(search.probes) <= (num - 1).bit_length()
            assert search.pieces == (num - 1 if rate == 0 else min(1, num - 1))


# -- regft -------------------------------------------------------------------------------------


def show(prompt: Prompt, hint: tuple[int, ...]) -> Prompt | None:
    """The hint in front; prompt c has no room."""
    return None if prompt.prompt_id == "c" else replace(prompt, token_ids=(1, *hint, 3))


HINTING = replace(SETUP, show_hint=show)


def by_hint(**rewards: Any) -> Any:
    """Two lists a prompt: rewards of its plain and of its hinted rollouts."""
    return lambda r: rewards[r.prompt.prompt_id][len(r.prompt.token_ids) > 2]


def test_regft_trains_own_solutions_under_the_plain_prompt():
    algorithm = build("regft", HINTING, max_kept_per_problem=2, rollouts_per_prompt=4)
    rewards = by_hint(
        a=([0, 0, 0, 0], [0, 1, 1, 1]),
        b=([0, 1, 1, 1], None),
        c=([0, 0, 0, 0], None),
        bare=([0, 0, 0, None], None),
        dark=([None] * 4, None),
    )
    prompts = [*PROMPTS, BARE, make_prompt("dark")]
    rounds = run_rounds(algorithm, prompts, rewards)
    assert [r.prompt.prompt_id for r in rounds[1][0]] == ["a"]
    assert rounds[1][0][0].prompt.token_ids == (1, *DEMONSTRATION[:5], 3)
    (update,) = assemble_rounds(algorithm, prompts, rounds)
    assert update.loss == "main"
    assert [row.group_id for row in update.samples] == ["a", "a", "b", "b"]
    for row in update.samples:
        assert row.token_ids.tolist() == [1, 3, 11, 2], "the hint is gone, the end token is there"
        assert row.source.tolist() == [0, 0, Source.EXPERT, Source.EXPERT]
        assert row.weights.tolist() == [1] * 4
        assert row.reward == 1
    assert algorithm.metrics() == {
        "kept_candidates": 4,
        "hard_without_hint": 2,
        "hard_share": 3 / 4,
    }


def test_regft_without_a_verified_solution_makes_no_update():
    algorithm = build("regft", HINTING)
    rounds = run_rounds(algorithm, PROMPTS[:1], by_hint(a=([0, 0], [None, 0])))
    assert [*assemble_rounds(algorithm, PROMPTS[:1], rounds)] == []
    assert algorithm.metrics()["kept_candidates"] == 0


def test_regft_never_shows_the_end_token_and_needs_to_know_how_to_show():
    algorithm = build("regft", HINTING, hint_fraction=1.0)
    rounds = run_rounds(algorithm, PROMPTS[:1], by_hint(a=([0, 0], [1, 1])))
    assert rounds[1][0][0].prompt.token_ids == (1, *DEMONSTRATION[:-1], 3)
    with pytest.raises(ValueError, match="show_hint"):
        run_rounds(build("regft"), PROMPTS[:1], by_hint(a=([0, 0], [1, 1])))


# -- grpo's refill -----------------------------------------------------------------------------


def test_grpo_refills_groups_without_signal_and_trains_only_live_ones():
    algorithm = build("grpo", drop_uniform_groups=True, refill_rounds=2)
    fresh = [make_prompt(name) for name in "defgh"]
    live, flat = [0, 1], [1, 1]
    given = {"a": live, "b": flat, "c": [None, None], "d": live, "e": flat, "f": live}
    rounds = run_rounds(algorithm, PROMPTS, lambda r: given[r.prompt.prompt_id], fresh=fresh)
    asked = [[r.prompt.prompt_id for r in requests] for requests, _ in rounds]
    assert asked == [["a", "b", "c"], ["d", "e"], ["f"]], "only what is missing is drawn"
    (update,) = assemble_rounds(algorithm, PROMPTS, rounds)
    assert [row.group_id for row in update.samples] == ["a", "a", "d", "d", "f", "f"]
    assert algorithm.metrics() == {"kept_groups": 3, "refilled_share": 2 / 3}


def test_grpo_stops_refilling_after_its_rounds_or_without_data():
    algorithm = build("grpo", drop_uniform_groups=True, refill_rounds=2)
    fresh = [make_prompt(str(i)) for i in range(9)]
    assert len(run_rounds(algorithm, PROMPTS, lambda r: [0, 0], fresh=fresh)) == 3
    assert len(run_rounds(algorithm, PROMPTS, lambda r: [0, 0], fresh=())) == 1
    (update,) = assemble_rounds(
        algorithm, PROMPTS, run_rounds(algorithm, PROMPTS, lambda r: [0, 0])
    )
    assert all((row.weights == 0).all() for row in update.samples), "nothing to train, no NaN"


def test_grpo_without_dropping_has_nothing_to_refill():
    assert len(run_rounds(build("grpo"), PROMPTS, lambda r: [0, 0])) == 1
    with pytest.raises(ValidationError, match="drop_uniform_groups is false"):
        build("grpo", refill_rounds=1)
