"""Plans and rows of hand-made groups: what production feeds the losses of the group methods."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from plait.algorithms import ALGORITHMS, AlgorithmBase, Setup
from plait.engine.errors import DataError
from plait.engine.types import (
    Demonstration,
    Prompt,
    Rollout,
    RolloutGroup,
    Sample,
    Sampling,
    Score,
    Source,
    Update,
)

RIGHT = Score.ok(1.0)
GROUP_METHODS = ("luffy", "srft", "visurf", "hpt", "super_rl", "topr", "rift")
MIXED = ("luffy", "srft")
SWITCHING = ("hpt", "super_rl")


def build(name: str, **config: Any) -> AlgorithmBase:
    cls = ALGORITHMS[name]
    values = {"type": name, "rollouts_per_prompt": 4, **config}
    return cls(cls.Config.model_validate(values), Setup(Sampling(max_tokens=8), minibatches=2))


def make_prompt(name: str, *demonstrations: Demonstration) -> Prompt:
    return Prompt(name, ({"role": "user", "content": name},), (5, 6), demonstrations=demonstrations)


def demonstrate(*token_ids: int, score: Score | None = RIGHT) -> Demonstration:
    return Demonstration(token_ids=token_ids, text="", score=score)


def make_group(prompt: Prompt, *rewards: float | None) -> RolloutGroup:
    """One rollout of two tokens a reward; None is UNKNOWN."""
    rollouts = tuple(
        Rollout(prompt.prompt_id, i, (7, 2), 0, (-0.5, -0.25), 3, "stop", "")
        for i in range(len(rewards))
    )
    scores = tuple(Score.unknown("deadline") if r is None else Score.ok(r) for r in rewards)
    return RolloutGroup(prompt, rollouts, scores)


def assemble(algorithm: AlgorithmBase, *groups: RolloutGroup) -> Update:
    plan = algorithm.plan([group.prompt for group in groups], [], 0)
    (update,) = algorithm.assemble(plan, groups, 0)
    return update


def is_expert(row: Sample) -> bool:
    return not (row.source == Source.POLICY).any()


def expert_rows(update: Update) -> list[Sample]:
    return [row for row in update.samples if is_expert(row)]


def policy_rows(update: Update) -> list[Sample]:
    return [row for row in update.samples if not is_expert(row)]


def advantages(rows: list[Sample]) -> list[float]:
    """One a row: that of its last token."""
    return [float(row.advantages[-1]) for row in rows]


PLAIN = make_prompt("plain")
TAUGHT = make_prompt("taught", demonstrate(9, 9, 2))


@pytest.mark.parametrize("name", GROUP_METHODS)
def test_each_update_uses_the_recipes_minibatches_and_the_main_loss(name):
    algorithm = build(name)
    update = assemble(algorithm, make_group(TAUGHT, 1.0, 0.0, 0.0))
    assert (update.loss, update.minibatches, update.epochs) == ("main", 2, 1)
    assert set(algorithm.losses) == set(algorithm.needs) == {"main"}


@pytest.mark.parametrize("name", GROUP_METHODS)
def test_rollouts_keep_the_samplers_logprobs_and_the_context_is_never_trained(name):
    row = policy_rows(assemble(build(name), make_group(PLAIN, 1.0, 0.0)))[0]
    assert row.source.tolist() == [0, 0, 1, 1]
    assert row.rollout_logprobs[2:].tolist() == [-0.5, -0.25]
    assert row.policy_version == 3
    assert row.advantages[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", MIXED)
def test_the_demonstration_takes_the_place_of_a_rollout(name):
    plan = build(name).plan([PLAIN, TAUGHT], [], 0)
    assert [request.n for request in plan.requests] == [4, 3]
    assert plan.experts == (TAUGHT,)


@pytest.mark.parametrize("name", ["visurf", *SWITCHING, "topr", "rift"])
def test_the_other_methods_roll_out_whole_groups(name):
    plan = build(name).plan([PLAIN, TAUGHT], [], 0)
    assert [request.n for request in plan.requests] == [4, 4]
    assert plan.experts == ((TAUGHT,) if name == "visurf" else ())


@pytest.mark.parametrize("name", [*MIXED, "visurf"])
def test_the_demonstration_is_scored_and_in_the_statistics(name):
    update = assemble(build(name, advantage="group_mean"), make_group(TAUGHT, 0.0, 0.0, 0.0))
    (expert,) = expert_rows(update)
    assert expert.reward == 1.0
    assert expert.token_ids.tolist() == [5, 6, 9, 9, 2]
    assert expert.advantages.tolist() == [0, 0, 0.75, 0.75, 0.75]
    wanted = -1.0 if name == "srft" else -0.25
    assert advantages(policy_rows(update)) == [wanted] * 3


@pytest.mark.parametrize("name", [*MIXED, "visurf"])
def test_the_demonstrations_own_score_counts(name):
    prompt = make_prompt("graded", demonstrate(9, 2, score=Score.ok(0.5)))
    update = assemble(build(name), make_group(prompt, 0.0, 0.0, 0.0))
    assert [row.reward for row in expert_rows(update)] == [0.5]


@pytest.mark.parametrize("name", [*MIXED, "visurf"])
def test_a_demonstration_that_was_not_graded_is_refused(name):
    prompt = make_prompt("ungraded", demonstrate(9, 2, score=None))
    with pytest.raises(DataError, match=r"'ungraded'.*declare demonstration_scores"):
        build(name).plan([prompt], [], 0)


@pytest.mark.parametrize("name", [*MIXED, "visurf"])
def test_a_demonstration_of_unknown_score_stays_out(name):
    prompt = make_prompt("ungraded", demonstrate(9, 2, score=Score.unknown("crash")))
    algorithm = build(name)
    assert [request.n for request in algorithm.plan([prompt], [], 0).requests] == [4]
    assert expert_rows(assemble(algorithm, make_group(prompt, 1.0, 0.0, 0.0, 0.0))) == []


@pytest.mark.parametrize("name", [*MIXED, "visurf"])
def test_a_prompt_without_demonstration_has_rollouts_only(name):
    update = assemble(build(name, advantage="group_mean"), make_group(PLAIN, 1.0, 0.0, 0.0, 0.0))
    assert len(update.samples) == 4
    wanted = [1.0, -1.0, -1.0, -1.0] if name == "srft" else [0.75, -0.25, -0.25, -0.25]
    assert advantages(list(update.samples)) == wanted


@pytest.mark.parametrize("name", MIXED)
def test_several_expert_rows_as_far_as_there_are_demonstrations(name):
    rich = make_prompt("rich", demonstrate(9, 2), demonstrate(8, 2), demonstrate(7, 2))
    algorithm = build(name, expert_rows_per_group=2)
    plan = algorithm.plan([rich, TAUGHT, PLAIN], [], 0)
    assert [request.n for request in plan.requests] == [2, 3, 4]
    update = assemble(algorithm, make_group(rich, 1.0, 0.0), make_group(TAUGHT, 1.0, 0.0, 0.0))
    assert [int(row.token_ids[2]) for row in expert_rows(update)] == [9, 8, 9]


@pytest.mark.parametrize("name", MIXED)
def test_a_group_without_rollouts_is_refused(name):
    with pytest.raises(ValidationError, match="leaves no rollout"):
        build(name, expert_rows_per_group=4)


@pytest.mark.parametrize("name", GROUP_METHODS)
def test_unknown_scores_train_nothing(name):
    update = assemble(build(name), make_group(TAUGHT, None, None, None))
    assert update.samples == ()


@pytest.mark.parametrize("name", GROUP_METHODS)
def test_an_unknown_score_is_in_no_statistic(name):
    known = assemble(build(name), make_group(PLAIN, 1.0, 0.0))
    mixed = assemble(build(name), make_group(PLAIN, 1.0, None, 0.0, None))
    assert advantages(list(mixed.samples)) == advantages(list(known.samples))


@pytest.mark.parametrize("name", GROUP_METHODS)
def test_a_group_of_one_rollout_keeps_its_reward(name):
    (row,) = assemble(build(name), make_group(PLAIN, 1.0)).samples
    assert float(row.advantages[-1]) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", GROUP_METHODS)
def test_long_demonstrations_are_cut(name):
    prompt = make_prompt("long", demonstrate(*range(10, 20)))
    update = assemble(build(name, max_response_length=4), make_group(prompt, 0.0, 0.0))
    assert all(len(row) == 6 for row in expert_rows(update))
    assert bool(expert_rows(update)) == (name not in ("topr", "rift"))


@pytest.mark.parametrize("name", SWITCHING)
def test_an_all_wrong_group_trains_its_demonstration(name):
    update = assemble(
        build(name),
        make_group(PLAIN, 0.0, 0.0),
        make_group(TAUGHT, 0.0, None, 0.0),
        make_group(make_prompt("solved", demonstrate(9, 2)), 1.0, 0.0),
    )
    assert [row.group_id for row in update.samples] == ["plain"] * 2 + ["taught"] + ["solved"] * 2
    (expert,) = expert_rows(update)
    assert expert.reward is None
    assert not expert.advantages.any()


def test_hpt_reports_how_many_prompts_it_switched():
    algorithm = build("hpt", solved_gate=1)
    assert algorithm.metrics() == {}
    unknown = make_group(make_prompt("unknown", demonstrate(9, 2)), None, None)
    assemble(algorithm, make_group(TAUGHT, 1.0, 0.0), make_group(PLAIN, 0.0, 0.0), unknown)
    assert algorithm.metrics() == {"sft_share": 0.5}


def test_hpt_counts_right_rollouts_against_the_gate():
    update = assemble(build("hpt", solved_gate=1), make_group(TAUGHT, 1.0, 0.99, 0.0, 0.0))
    assert len(update.samples) == len(expert_rows(update)) == 1
    assert len(policy_rows(assemble(build("hpt"), make_group(TAUGHT, 1.0, 0.0)))) == 2


def test_super_rl_trains_all_demonstrations_and_weighs_by_prompts():
    rich = make_prompt("rich", demonstrate(9, 2), demonstrate(8, 2), demonstrate(7, 2))
    update = assemble(
        build("super_rl"),
        make_group(rich, 0.0, 0.0),
        make_group(TAUGHT, 0.1, 0.0),
        make_group(make_prompt("b"), 1.0, 0.0),
    )
    assert len(expert_rows(update)) == 3
    assert update.coefs == {"expert_share": pytest.approx(1 / 3)}


def test_super_rl_does_not_count_prompts_that_train_nothing():
    algorithm = build("super_rl", drop_uniform_groups=True)
    update = assemble(algorithm, make_group(TAUGHT, 0.0, 0.0), make_group(PLAIN, 1.0, 1.0))
    assert update.coefs == {"expert_share": 1.0}
    assert assemble(algorithm, make_group(PLAIN, 1.0, 1.0)).coefs == {"expert_share": 0.0}


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.7])
def test_visurf_smooths_a_label_that_is_no_better(reward):
    algorithm = build("visurf")
    assert algorithm.metrics() == {}
    update = assemble(
        algorithm,
        make_group(TAUGHT, 1.0, 0.0, 1.0),
        make_group(make_prompt("weak", demonstrate(9, 2)), 0.0, 0.5),
    )
    smoothed, kept = expert_rows(update)
    assert not smoothed.advantages.any()
    assert smoothed.reward == pytest.approx(2 / 3)
    assert float(kept.advantages[-1]) > 0
    assert algorithm.metrics() == {"smoothed_share": 0.5}
    equal = make_prompt("equal", demonstrate(9, 2, score=Score.ok(reward)))
    update = assemble(algorithm, make_group(equal, *[reward] * 7))
    assert not any(row.advantages.any() for row in update.samples)


def test_visurf_without_smoothing_keeps_the_labels_reward():
    update = assemble(build("visurf", smooth_expert_reward=False), make_group(TAUGHT, 1.0, 0.0))
    assert [row.reward for row in expert_rows(update)] == [1.0]
    assert advantages(expert_rows(update))[0] > 0


@pytest.mark.parametrize("name", [*MIXED, "visurf"])
def test_dropped_groups_lose_their_demonstration_too(name):
    update = assemble(build(name, drop_uniform_groups=True), make_group(TAUGHT, 1.0, 1.0, 1.0))
    assert len(update.samples) == 4
    assert not any(row.weights.any() for row in update.samples)


def test_topr_advantages_are_rewards_above_the_baseline():
    update = assemble(build("topr", reward_baseline=0.25), make_group(TAUGHT, 1.0, -1.0, 0.25))
    assert advantages(list(update.samples)) == [0.75, -1.25, 0.0]
    assert expert_rows(update) == []


def test_rift_signs_rewards_and_trains_expert_rows_that_have_one():
    algorithm = build("rift")
    update = assemble(algorithm, make_group(PLAIN, 1.0, 0.9, 0.0))
    np.testing.assert_allclose(advantages(list(update.samples)), [1.0, -0.2, -0.2])
    mixed = assemble(build("luffy"), make_group(TAUGHT, 0.0, 0.0))
    (expert,) = [row for row in algorithm.credit(mixed.samples) if is_expert(row)]
    assert expert.advantages.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("srft", "clip_low"),
        ("srft", "clip_high"),
        ("srft", "dual_clip"),
        ("srft", "ratio_level"),
        ("srft", "expert_loss"),
        ("luffy", "expert_loss"),
        ("visurf", "expert_normalizer"),
        ("super_rl", "expert_coef"),
        ("topr", "clip_low"),
        ("topr", "advantage"),
        ("topr", "sampler_ratio_cap"),
        ("rift", "kl_coef"),
        ("rift", "clip_high"),
    ],
)
def test_fields_without_effect_are_refused(name, field):
    with pytest.raises(ValidationError, match="Extra inputs"):
        build(name, **{field: 0.5})


def test_needs_follow_the_config():
    scored = {"demonstrations", "demonstration_scores"}
    assert build("srft").needs["main"] == {"entropy", *scored}
    assert "old_logprobs" in build("srft", rollout_form="ratio").needs["main"]
    assert "old_logprobs" in build("srft", sampler_ratio_cap=2.0).needs["main"]
    assert "entropy" in build("srft", entropy_coef=0.0).needs["main"]
    assert build("rift").needs["main"] == set()
    assert build("rift", entropy_coef=0.1).needs["main"] == {"entropy"}
    assert build("topr", kl_coef=0.1).needs["main"] == {"old_logprobs", "ref_logprobs"}
    assert build("luffy").needs["main"] == {"old_logprobs", "entropy", *scored}
