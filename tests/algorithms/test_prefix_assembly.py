"""What the prefix and interleaving algorithms ask for, and what they make of the answers; resuming continues them."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from plait.algorithms import Setup, resolve
from plait.algorithms.draws import uniforms
from plait.engine.batch import collate
from plait.engine.errors import CheckpointError
from plait.engine.types import (
    Sampling,
    Score,
    Source,
    UpdateReport,
)
from steps import PROMPTS, SETUP, answer, make_prompt


def build(name: str, setup: Setup = SETUP, **config: Any) -> Any:
    cls = resolve(name)
    return cls(cls.Config.model_validate({"type": name, **config}), setup)


def test_draws_depend_on_the_whole_key_and_on_nothing_else():
    draws = uniforms(3, 3, "uft", 5, "a")
    assert draws == uniforms(3, 3, "uft", 5, "a")
    assert all(0 <= draw < 1 for draw in draws)
    others = [
        uniforms(3, *key) for key in ((4, "uft", 5, "a"), (3, "uft", 6, "a"), (3, "uft", 5, "b"))
    ]
    assert all(draws != other for other in others)


def test_uft_shows_whole_pieces_and_never_the_last():
    algorithm = build("uft", hint_probability_high=1.0, hint_probability_low=1.0)
    plan = algorithm.plan([*PROMPTS, make_prompt("d", demonstrated=False)], [], 0)
    assert [len(r.prefix) for r in plan.requests] == [5, 5, 5, 0]
    assert [r.n for r in plan.requests] == [4] * 4
    assert plan.requests[0].prefix == PROMPTS[0].demonstrations[0].token_ids[:5]
    algorithm.assemble(plan, [], 0)
    assert algorithm.metrics() == {"hint_share": 0.75, "hinted_rows": 0.75}
    short = build("uft", replace(SETUP, sampling=Sampling(5)), hint_probability_low=1.0)
    assert [len(r.prefix) for r in short.plan(PROMPTS, [], 0).requests] == [3, 3, 3]
    assert all(not r.prefix for r in algorithm.plan(PROMPTS, [], 300).requests)


def test_uft_hints_repeat_and_change_with_the_step():
    def lengths(step):
        many = [make_prompt(str(i)) for i in range(20)]
        return [len(r.prefix) for r in build("uft").plan(many, [], step).requests]

    assert lengths(150) == lengths(150)
    assert lengths(150) != lengths(151)
    assert len(set(lengths(150))) > 1


def test_uft_trains_the_hint_as_expert_and_credits_only_the_rest():
    algorithm = build("uft", hint_probability_low=1.0)
    plan = algorithm.plan(PROMPTS[:1], [], 0)
    (update,) = algorithm.assemble(plan, answer(plan.requests, {"a": [1, 0, 0, 0]}), 0)
    row = update.samples[0]
    assert row.source.tolist() == [0, 0, 2, 2, 2, 2, 2, 1, 1]
    assert (row.advantages[:7] == 0).all()
    assert (row.advantages[7:] > 1).all()
    assert np.isnan(row.rollout_logprobs[:7]).all()
    assert "hint_probability" in update.coefs


def test_prefix_rft_adds_one_prefixed_rollout():
    algorithm = build("prefix_rft")
    plan = algorithm.plan([PROMPTS[0], make_prompt("d", demonstrated=False)], [], 0)
    shapes = [(r.prompt.prompt_id, r.n, r.first_index, len(r.prefix)) for r in plan.requests]
    assert shapes == [("a", 7, 0, 0), ("a", 1, 7, 6), ("d", 8, 0, 0)]
    short = build("prefix_rft", replace(SETUP, sampling=Sampling(3)))
    assert [len(r.prefix) for r in short.plan(PROMPTS[:1], [], 0).requests] == [0, 2]


def test_prefix_rft_shares_or_separates_the_advantage():
    rewards = {"a": [1, 0, 0, 1]}
    shared = build("prefix_rft", rollouts_per_prompt=4)
    plan = shared.plan(PROMPTS[:1], [], 0)
    (update,) = shared.assemble(plan, answer(plan.requests, rewards), 0)
    hybrid = update.samples[-1]
    assert (hybrid.advantages[hybrid.source > 0] == 0.5).all()
    assert shared.metrics()["reward_with_prefix"] == 1
    assert shared.metrics()["prefix_share"] == pytest.approx(6 / 14)
    separate = build("prefix_rft", rollouts_per_prompt=4, prefix_advantage="separate")
    (update,) = separate.assemble(plan, answer(plan.requests, rewards), 0)
    hybrid = update.samples[-1]
    assert (hybrid.advantages[hybrid.source == Source.POLICY] == 1).all()
    assert hybrid.advantages[hybrid.source == Source.EXPERT] == pytest.approx(2 / 3)


def test_prefix_rft_filters_over_the_whole_update():
    algorithm = build("prefix_rft", rollouts_per_prompt=4, entropy_keep_fraction=0.25)
    plan = algorithm.plan(PROMPTS[:2], [], 0)
    rewards = {"a": [1, 0, 0, 1], "b": [1, 0, 0, 1]}
    (update,) = algorithm.assemble(plan, answer(plan.requests, rewards), 0)
    batch = collate(update.samples)
    prefix = batch.source == Source.EXPERT
    entropy = torch.ones(batch.num_tokens)
    entropy[prefix.nonzero()[0]] = 5.0
    finished = algorithm.finish(replace(batch, old_entropy=entropy))
    kept = (finished.advantages != 0)[prefix].tolist()
    # 12 prefix tokens: the one of high entropy and, of equal ones, the last two.
    assert kept == [True] + [False] * 9 + [True] * 2
    assert torch.equal(finished.advantages[~prefix], batch.advantages[~prefix])


def relift_step(algorithm, rewards, prompts=PROMPTS):
    plan = algorithm.plan(prompts, [], 0)
    return algorithm.assemble(plan, answer(plan.requests, rewards), 0)


def test_relift_trains_a_full_buffer_with_its_own_optimizer():
    algorithm = build(
        "relift", rollouts_per_prompt=2, expert_batch_size=3, expert_learning_rate=3e-6
    )
    updates = relift_step(algorithm, {"a": [0, 0], "b": [1, 0], "c": [0, 0]})
    assert [update.loss for update in updates] == ["main"]
    assert algorithm.metrics()["buffer_size"] == 2
    undemonstrated = [make_prompt("a"), make_prompt("d", demonstrated=False)]
    main, sft = relift_step(algorithm, {"a": [0, 0], "d": [0, 0]}, undemonstrated)
    assert (main.loss, main.optimizer, main.learning_rate) == ("main", "main", None)
    assert (sft.loss, sft.optimizer, sft.learning_rate) == ("sft", "expert", 3e-6)
    assert [row.group_id for row in sft.samples] == ["a", "a", "c"]
    assert all((row.source[2:] == Source.EXPERT).all() for row in sft.samples)
    assert algorithm.metrics() == {"buffer_size": 0, "failed_prompts": 2, "sft_phases": 0}
    shared = build("relift", rollouts_per_prompt=2, expert_batch_size=1, expert_optimizer="shared")
    assert relift_step(shared, {"a": [0, 0], "b": [1, 0], "c": [1, 1]})[1].optimizer == "main"


def test_relift_does_not_take_unknown_for_failed():
    algorithm = build("relift", rollouts_per_prompt=2)
    relift_step(algorithm, {"a": [None, 0], "b": [None, None], "c": [0, 0]})
    assert [prompt.prompt_id for prompt in algorithm.buffer] == ["c"]


def test_relift_resumes_with_its_buffer():
    config: dict[str, Any] = {"rollouts_per_prompt": 2, "expert_batch_size": 5}
    algorithm = build("relift", **config)
    relift_step(algorithm, {"a": [0, 0], "b": [1, 0], "c": [0, 0]})
    state = json.loads(json.dumps(algorithm.state_dict()))
    assert state["buffer"] == ["a", "c"]
    found = {prompt.prompt_id: prompt for prompt in PROMPTS}
    resumed = build("relift", replace(SETUP, find_prompt=found.__getitem__), **config)
    resumed.load_state_dict(state)
    rewards = {"a": [0, 0], "b": [0, 0], "c": [0, 0]}
    for one, other in zip(
        relift_step(algorithm, rewards), relift_step(resumed, rewards), strict=True
    ):
        assert [r.group_id for r in one.samples] == [r.group_id for r in other.samples]
    assert resumed.state_dict() == algorithm.state_dict()
    with pytest.raises(CheckpointError, match="find_prompt"):
        build("relift", **config).load_state_dict(state)


def test_relift_resumes_with_the_verdicts_on_its_demonstrations():
    verdicts = {"a": Score.ok(0.5), "b": Score.unknown("timeout"), "c": None}
    prompts = [
        replace(p, demonstrations=(replace(p.demonstrations[0], score=verdicts[p.prompt_id]),))
        for p in PROMPTS
    ]
    algorithm = build("relift", rollouts_per_prompt=2)
    relift_step(algorithm, {"a": [0, 0], "b": [0, 0], "c": [0, 0]}, prompts)
    found = {prompt.prompt_id: prompt for prompt in PROMPTS}
    resumed = build("relift", replace(SETUP, find_prompt=found.__getitem__), rollouts_per_prompt=2)
    resumed.load_state_dict(json.loads(json.dumps(algorithm.state_dict())))
    assert {p.prompt_id: p.demonstrations[0].score for p in resumed.buffer} == verdicts


def run_sasr(algorithm, steps):
    kinds = []
    for step in steps:
        plan = algorithm.plan(PROMPTS, [], step)
        groups = answer(plan.requests, {name: [1, 0] for name in "abc"})
        (update,) = algorithm.assemble(plan, groups, step)
        kinds.append((update.loss, update.refresh_reference))
        # Two minibatches a step: the gate sees their mean.
        for extra in (-0.5, 0.5):
            report = UpdateReport(update.loss, 2.0 / (step + 1) + extra * (step == 0), {}, 1e-6)
            algorithm.observe(report)
    return kinds


def test_sasr_warms_up_then_draws_and_moves_the_reference_once():
    algorithm = build("sasr", warmup_steps=3, rollouts_per_prompt=2)
    kinds = run_sasr(algorithm, range(20))
    assert [kind for kind, _ in kinds[:3]] == ["sft"] * 3
    assert {kind for kind, _ in kinds[3:]} == {"sft", "main"}
    assert [moved for _, moved in kinds] == [step == 3 for step in range(20)]
    assert algorithm.warmup_norm == pytest.approx(2 / 3)
    frozen = build("sasr", warmup_steps=3, rollouts_per_prompt=2, kl_coef=0.0)
    assert not any(moved for _, moved in run_sasr(frozen, range(5)))


def test_sasr_resumes_its_gate():
    config: dict[str, Any] = {"warmup_steps": 3, "rollouts_per_prompt": 2}
    whole = build("sasr", **config)
    expected = run_sasr(whole, range(30))
    for cut in (1, 3, 7, 15):
        first, second = build("sasr", **config), build("sasr", **config)
        kinds = run_sasr(first, range(cut))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert kinds + run_sasr(second, range(cut, 30)) == expected
        assert second.state_dict() == whole.state_dict()


def test_sasr_without_a_norm_imitates():
    algorithm = build("sasr", warmup_steps=1)
    algorithm.plan(PROMPTS, [], 1)
    assert algorithm.sft_probability == 1.0


def test_one_token_rollout_trains_the_prompts_demonstrations():
    algorithm = build("one_token_rollout", samples_per_token=16, sampling_temperature=1.1)
    assert algorithm.token_sampling.num_samples == 16
    assert algorithm.token_sampling.temperature == 1.1
    plan = algorithm.plan(PROMPTS, [], 0)
    assert not plan.requests
    (update,) = algorithm.assemble(plan, [], 0)
    assert [row.group_id for row in update.samples] == ["a", "b", "c"]
