"""Data selection inside sft: which rows and tokens are left, what is remembered, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from math import log

import pytest
import torch
import yaml

from plait.algorithms import Setup
from plait.algorithms.rows import expert_rows
from plait.algorithms.selection_rules import best, prune_tokens, q_tuning_rows, quantile
from plait.algorithms.sft import Sft, SftConfig
from plait.engine.batch import collate
from plait.engine.errors import ConfigError
from plait.engine.types import Demonstration, Prompt, Rollout, RolloutGroup, Sampling, Score, Source
from plait.launch.config import load_recipe

LENGTH = 4


def make_sft(expert_loss="nll", **rule):
    config = {"type": "sft", "data_selection": rule, "expert_loss": {"type": expert_loss}}
    return Sft(SftConfig.model_validate(config), Setup(Sampling(16)))


def make_prompts(num):
    return [
        Prompt(f"p{i}", (), (5, 6), demonstrations=(Demonstration((10 + i, 11, 12, 2), "gold"),))
        for i in range(num)
    ]


def group(prompt, *rewards):
    rollouts = tuple(
        Rollout(prompt.prompt_id, i, (30 + i, 2), 0, (-1.0, -1.0), 0, "stop", f"{i}")
        for i in range(len(rewards))
    )
    scores = tuple(Score.unknown("test") if r is None else Score.ok(r) for r in rewards)
    return RolloutGroup(prompt, rollouts, scores)


def recorded(prompts, **columns):
    """The candidate batch; each column gives one number a row, the same for its four supervised tokens."""
    batch = collate(expert_rows(prompts, 16))
    values = {
        name: torch.tensor(numbers)[batch.row_ids].where(batch.trained, 0.0)
        for name, numbers in columns.items()
    }
    return replace(batch, **values)


def trained_prompts(batch):
    assert len(batch.group_names) == batch.num_rows
    return list(batch.group_names)


# -- rules on recorded columns ----------------------------------------------------------------------


def test_q_tuning_drops_rows_and_prunes_tokens():
    sft = make_sft(type="q_tuning")
    perplexity, entropy = [8.0, 2.0, 3.0, 9.0], [2.0, 1.9, 1.0, 0.5]
    batch = recorded(
        make_prompts(4), old_logprobs=[-log(p) for p in perplexity], old_entropy=entropy
    )
    whole, pruned, added = q_tuning_rows(perplexity, entropy, 0.5, 10)
    assert (whole, pruned, added) == ([1], [3], [])
    left = sft.finish(batch)
    assert trained_prompts(left) == ["p1", "p3"]
    assert left.is_trained(Source.EXPERT).sum() == LENGTH + LENGTH // 2
    assert left.denom.expert_tokens == 6
    assert left.denom.expert_rows == 2
    assert left.old_logprobs is not None
    assert sft.metrics() == {
        "selection_kept_rows": 0.5,
        "selection_empty": 0.0,
        "selection_kept_tokens": 6 / 16,
    }


def test_q_tuning_keeps_token_weights_of_what_stays():
    sft = make_sft(type="q_tuning", token_keep_fraction=1.0)
    batch = recorded(make_prompts(2), old_logprobs=[-1.0, -2.0], old_entropy=[1.0, 0.5])
    batch = replace(batch, weights=batch.weights * 0.5)
    left = sft.finish(batch)
    assert left.num_rows
    assert (left.weights[left.trained] == 0.5).all()


def test_uds_keeps_the_best_row_and_remembers_it():
    sft = make_sft(type="uds", keep_rows=2, diversity_weight=1.0, buffer_size=3)
    prompts = make_prompts(3)
    columns = {
        "logit_norms": torch.tensor([1.0, 3.0, 2.0]),
        "logit_sketches": torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
    }
    batch = replace(recorded(prompts), **columns)
    assert trained_prompts(sft.finish(batch)) == ["p1", "p2"]
    assert sft.state_dict() == {"selection": {"buffer": [[1.0, 0.0], [0.0, 1.0]]}}
    state = json.loads(json.dumps(sft.state_dict()))
    again = make_sft(type="uds", keep_rows=2, diversity_weight=1.0, buffer_size=3)
    again.load_state_dict(state)
    for algorithm in (sft, again):
        assembled(algorithm, prompts, ())
        algorithm.finish(batch)
        left = algorithm.finish(batch)  # a second look at the same step changes nothing
        assert trained_prompts(left) == ["p1", "p2"]
        buffer = algorithm.state_dict()["selection"]["buffer"]
        assert buffer == [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]


def test_lobass_keeps_unseen_rows_and_ranks_seen_ones():
    sft = make_sft(type="lobass", keep_fraction=0.5)
    prompts = make_prompts(4)
    first = recorded(prompts[:3], old_logprobs=[-1.0, -1.9, -0.2], ref_logprobs=[-2.0, -2.0, -2.0])
    assert sft.finish(first).num_rows == 3
    state = json.loads(json.dumps(sft.state_dict()))
    assert state["selection"]["losses"]["p1#0"] == pytest.approx(1.9)
    again = make_sft(type="lobass", keep_fraction=0.5)
    again.load_state_dict(state)
    assembled(again, prompts, ())
    second = recorded(prompts, old_logprobs=[-0.5] * 4, ref_logprobs=[-2.0] * 4)
    # Gains 0.5, 0.05 and 0.9 of the seen rows: one of three is kept, and the row that was never seen.
    for _ in range(2):
        assert trained_prompts(again.finish(second)) == ["p2", "p3"]
    assert again.ledger((), 0).dropped == {"p0": "not_selected", "p1": "not_selected"}
    assert again.state_dict()["selection"]["losses"]["p1#0"] == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["q_tuning", "uds", "lobass"])
def test_a_batch_without_supervised_tokens_stays_empty(kind):
    sft = make_sft(type=kind)
    batch = recorded(make_prompts(2), old_logprobs=[-1.0] * 2)
    left = sft.finish(replace(batch, weights=batch.weights * 0))
    assert left.num_rows == 0
    assert left.denom.tokens == 0
    assert "selection_kept_rows" not in sft.metrics()
    nothing = sft.finish(collate(()))
    assert nothing.num_rows == 0


def test_a_rule_without_its_column_says_so():
    with pytest.raises(ValueError, match="old_logprobs"):
        make_sft(type="q_tuning").finish(recorded(make_prompts(2)))


def test_needs_are_declared():
    assert {"old_logprobs", "old_entropy"} <= make_sft(type="q_tuning").needs["main"]
    assert "row_sketch" in make_sft(type="uds").needs["main"]
    assert {"recorded_logprobs", "ref_logprobs"} <= make_sft(type="lobass").needs["main"]


# -- rules on rollouts --------------------------------------------------------------------------------


def assembled(sft, prompts, groups):
    plan = sft.plan(prompts, (), 0)
    (update,) = sft.assemble(plan, groups, 0)
    return plan, update.samples


def test_the_first_accepted_response_replaces_the_demonstration():
    sft = make_sft(type="self_response", max_candidates=3)
    prompts = make_prompts(4)
    groups = [
        group(prompts[0], 0.0, 1.0, 1.0),
        group(prompts[1], 0.0, 0.0, 0.5),
        group(prompts[2], None, None, None),
        group(prompts[3], None, 1.0, 0.0),
    ]
    plan, rows = assembled(sft, prompts, groups)
    assert [request.n for request in plan.requests] == [3] * 4
    texts = [row.token_ids[2:].tolist() for row in rows]
    assert texts == [[31, 2], [11, 11, 12, 2], [12, 11, 12, 2], [31, 2]]
    assert all((row.source[2:] == Source.EXPERT).all() for row in rows)
    assert (rows[0].reward, rows[1].reward) == (1.0, None)
    assert sft.metrics()["self_response_share"] == 0.5
    assert sft.ledger((), 0).dropped == {"p0": "self_response", "p3": "self_response"}
    assert sft.metrics()["selection_kept_rows"] == 1.0


def test_the_filter_drops_unsolved_prompts_and_keeps_unknown_ones():
    sft = make_sft(type="rollout_filter", rollouts_per_prompt=2, max_mean_reward=1.0)
    prompts = make_prompts(4)
    groups = [
        group(prompts[0], 0.0, 0.0),
        group(prompts[1], 0.0, 1.0),
        group(prompts[2], None, None),
        group(prompts[3], 1.0, None),
    ]
    _, rows = assembled(sft, prompts, groups)
    assert [row.group_id for row in rows] == ["p1", "p2"]
    assert sft.metrics() == {
        "selection_unknown_prompts": 1.0,
        "selection_kept_rows": 0.5,
        "selection_empty": 0.0,
    }


def test_a_step_of_which_nothing_is_left_says_so():
    sft = make_sft(type="rollout_filter", rollouts_per_prompt=2)
    prompts = make_prompts(2)
    _, rows = assembled(sft, prompts, [group(p, 0.0, 0.0) for p in prompts])
    assert rows == ()
    assert sft.metrics()["selection_empty"] == 1.0
    assert sft.finish(collate(rows)).denom.tokens == 0


def test_metrics_are_those_of_the_last_step():
    sft = make_sft(type="self_response")
    prompts = make_prompts(2)
    assembled(sft, prompts, [group(p, 1.0) for p in prompts])
    assembled(sft, prompts, [group(p, 0.0) for p in prompts])
    assert sft.metrics()["self_response_share"] == 0.0


# -- config ---------------------------------------------------------------------------------------


def test_other_hosts_are_refused(tmp_path):
    recipe = {
        "model": "m",
        "algorithm": {"type": "chord", "data_selection": {"type": "uds"}},
        "data": {"type": "jsonl", "path": "d"},
        "loop": {"steps": 1},
        "eval": {"num_prompts": 0},
    }
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe))
    with pytest.raises(ConfigError, match="whose expert rows stand alone: sft"):
        load_recipe(file)
    with pytest.raises(ConfigError, match="whose expert rows stand alone: sft"):
        load_recipe(file, ["algorithm.type=regft"])


@pytest.mark.parametrize("kind", ["self_response", "rollout_filter"])
def test_rules_with_rollouts_need_a_reward(kind, tmp_path):
    recipe = {
        "model": "m",
        "algorithm": {"type": "sft", "data_selection": {"type": kind}},
        "data": {"type": "jsonl", "path": "d"},
        "loop": {"steps": 1},
        "eval": {"num_prompts": 0},
    }
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe))
    with pytest.raises(ConfigError, match="reward"):
        load_recipe(file)
    load_recipe(file, ["algorithm.data_selection={type: q_tuning}"])


# -- arithmetic -----------------------------------------------------------------------------------


def test_quantile_is_a_sample_value():
    values = [3.0, 1.0, 2.0, 4.0]
    assert [quantile(values, q) for q in (0, 0.25, 0.26, 0.5, 1)] == [1, 1, 2, 2, 4]


def test_ties_go_to_the_earlier():
    assert best([1.0, 2.0, 2.0, 2.0], 2) == [1, 2]
    assert best([1.0], 3) == [0]


@pytest.mark.parametrize("n", range(1, 12))
@pytest.mark.parametrize("fraction", [0.3, 0.5, 1.0])
def test_q_tuning_fills_up_to_its_share(n, fraction):
    generator = torch.Generator().manual_seed(n)
    perplexity, entropy = torch.rand(2, n, generator=generator).tolist()
    whole, pruned, added = q_tuning_rows(perplexity, entropy, fraction, 10)
    chosen = [*whole, *pruned, *added]
    assert len(chosen) == len(set(chosen))
    assert len(chosen) >= fraction * n - 1e-9
    equal = q_tuning_rows([2.0] * n, [1.0] * n, fraction, 10)
    assert sum(map(len, equal)) >= fraction * n - 1e-9


def test_prune_tokens_keeps_a_rounded_up_share():
    nll = [log(4), log(1), log(2)]
    assert prune_tokens(nll, 0.5, 0.0, "highest") == [False, True, True]
    assert prune_tokens(nll, 0.5, 0.0, "lowest") == [True, False, True]
    assert prune_tokens(nll, 1.0, 0.5, "highest") == [True] * 3
    assert prune_tokens([], 0.5, 0.5, "highest") == []
