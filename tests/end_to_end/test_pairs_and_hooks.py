"""sft with pairwise losses and input hooks: recipe, data, rows and a real DeepSpeed learner in process."""

from __future__ import annotations

import json
from math import isfinite
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from end_to_end.command_line import tiny_recipe, write_recipe
from plait.engine.batch import collate, select
from plait.engine.config import LearnerConfig
from plait.engine.errors import ConfigError, DataError
from plait.engine.learner import LearnerWorker, Rank, WeightRoute
from plait.engine.learners import InProcessRank, LearnerGroup
from plait.engine.loop import apply_update, make_batch
from plait.engine.packing import partition
from plait.engine.types import Source
from plait.launch.check_loss import joined, micro_batchings, placements, together
from plait.launch.config import load_recipe
from plait.launch.run import check_inputs, load_prompts

PAIRWISE: dict[str, dict[str, Any]] = {
    "dpop": {"chosen_penalty_coef": 5.0},
    "spin": {},
    "aligned_asft": {},
    "discriminative_ft": {},
    "redi": {},
}
MASKED = {"type": "masked_thought", "total_steps": 2, "warmup_fraction": 0.0, "mask_rate": 0.5}
HOOKS: dict[str, dict[str, Any]] = {
    "mask token": {**MASKED, "mask_token_id": 0},
    "random token": {**MASKED, "replacement": "random_token"},
    "hidden": {**MASKED, "mask_token_id": 0, "hide_from_attention": True},
    "empty prompt": {"type": "qfft"},
    "no context": {"type": "qfft", "context": "none"},
}
LOSSES = {
    **{name: {"type": name, **fields} for name, fields in PAIRWISE.items()},
    **{name: {"type": "iw_sft", "input_hook": hook} for name, hook in HOOKS.items()},
    "redi, mask token": {"type": "redi", "input_hook": HOOKS["mask token"]},
}
"""iw_sft reads reference log-probs, so they are computed on the changed input too."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        {
            "id": f"sum{i}",
            "prompt": f"{i} + 4 =",
            "demonstration": f"That is {i + 4}.",
            "rejected": [f"{i + 3}.", f"Maybe {i}?"][: i % 3],
        }
        for i in range(12)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bare = [{k: v for k, v in row.items() if k != "rejected"} for row in rows]
    (folder / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    return folder


def load(folder, model, loss, monkeypatch, **sections):
    monkeypatch.chdir(folder)
    recipe = tiny_recipe(
        model,
        data={"path": "pairs.jsonl"},
        loop={"steps": 2, "prompts_per_step": 6},
        eval={"num_prompts": 0},
        rollouts={"max_response_length": 16},
    )
    for name, fields in sections.items():
        recipe[name] = {**recipe.get(name, {}), **fields}
    recipe["algorithm"] = {"type": "sft", "expert_loss": loss}
    return load_recipe(write_recipe(folder, "recipe.yaml", recipe))


def start(folder, model, loss, monkeypatch, **sections) -> Any:
    """The parts that training without rollouts needs."""
    recipe = load(folder, model, loss, monkeypatch, **sections)
    inputs = check_inputs(recipe)
    data = load_prompts(inputs, str(model))
    algorithm = recipe.build_algorithm()
    algorithm.use_prompts(data)
    worker = LearnerWorker(
        str(model), recipe.learner, algorithm.losses, algorithm.needs, Rank(), seed=0
    )
    route = WeightRoute("shared_memory", "float32", 60.0)
    learners = LearnerGroup(
        InProcessRank(worker), recipe.learner, algorithm.needs, total_steps=2, seed=0, route=route
    )
    return SimpleNamespace(algorithm=algorithm, data=data, learners=learners, worker=worker)


def updates_of(parts, step):
    prompts = parts.data.take(6)
    return parts.algorithm.assemble(parts.algorithm.plan(prompts, (), step), (), step)


@pytest.mark.parametrize("name", LOSSES)
def test_sft_trains_with_it(name, folder, tiny_model, monkeypatch):
    parts = start(folder, tiny_model, LOSSES[name], monkeypatch)
    for step in range(2):
        (update,) = updates_of(parts, step)
        (report,) = apply_update(parts, update, step)
        assert report.grad_norm > 0
        assert all(isfinite(value) for value in report.metrics.values())
        if name in PAIRWISE:
            assert 0 < report.metrics["expert_probability"] < 1
            assert parts.algorithm.metrics()["unpaired_prompts"] == 2
        if name == "discriminative_ft":
            assert "expert_log_normalizer" in report.metrics
        elif name in PAIRWISE:
            assert {"expert_margin", "expert_pair_accuracy"} <= report.metrics.keys()
        if "token" in name:
            assert report.metrics["mask_rate"] == 0.5 * step
    if name == "discriminative_ft":
        state = json.loads(json.dumps(parts.algorithm.state_dict()))
        assert len(state["expert_memory"]) == 8  # both steps' prompts that have a pair
        restored = type(parts.algorithm)(parts.algorithm.config, parts.algorithm.setup)
        restored.load_state_dict(state)
        assert restored.expert_memory == parts.algorithm.expert_memory


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", LOSSES)
def test_cutting_the_minibatch_changes_nothing(name, packing, folder, tiny_model, monkeypatch):
    learner = {"packing": packing, "max_tokens_per_micro_batch": 4096}
    parts = start(folder, tiny_model, LOSSES[name], monkeypatch, learner=learner)
    (update,) = updates_of(parts, 1)
    batch = make_batch(parts, update)
    current = parts.learners.annotate(batch, frozenset({"old_logprobs"}), single=False)
    prepared = parts.algorithm.prepare(batch, current.old_logprobs, update.coefs)
    wholes = partition(prepared, 1, 4096).plans[0]
    cuts = partition(prepared, 1, 45 if prepared.pairs is None else 130).plans[0]
    assert len(wholes) == 1 < len(cuts)

    def gradients(plan):
        return parts.worker.gradients(
            [select(prepared, rows) for rows in plan], "main", update.coefs
        )

    report, expected = gradients(wholes)
    other, found = gradients(cuts)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-6, rtol=1e-5)
    for key, value in report.metrics.items():
        assert other.metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", HOOKS)
def test_packed_and_padded_rows_agree(name, folder, tiny_model, monkeypatch):
    """What is read and what is predicted, against the plain model asked row by row."""
    found = {}
    for packing in (True, False):
        parts = start(folder, tiny_model, LOSSES[name], monkeypatch, learner={"packing": packing})
        (update,) = updates_of(parts, 1)
        found[packing] = make_batch(parts, update)
    batch = found[True]
    torch.testing.assert_close(batch.ref_logprobs, found[False].ref_logprobs, atol=2e-5, rtol=1e-5)
    changed = batch.input_ids != batch.targets
    assert bool(changed.any()) == ("prompt" not in name and name != "no context")
    assert not bool((changed & ~batch.trained).any())
    if name == "hidden":
        assert torch.equal(batch.hidden, changed)
        shown = start(folder, tiny_model, LOSSES["mask token"], monkeypatch)
        (update,) = updates_of(shown, 1)
        other = make_batch(shown, update)
        assert torch.equal(other.input_ids, batch.input_ids)
        assert other.ref_logprobs is not None
        assert not torch.allclose(other.ref_logprobs, batch.ref_logprobs)
        return
    from plait.engine.model import load_model, token_logprobs

    model = load_model(str(tiny_model), LearnerConfig(packing=False)).eval()
    for row in range(batch.num_rows):
        span = slice(*batch.row_starts[row : row + 2].tolist())
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids[span][None]).logits[0]
        expected = token_logprobs(logits[:-1], batch.targets[span][1:])
        got, trained = batch.ref_logprobs[span][1:], batch.trained[span][1:]
        torch.testing.assert_close(got[trained], expected[trained], atol=2e-5, rtol=1e-5)


def test_hooked_rows_read_what_the_hook_says(folder, tiny_model, monkeypatch):
    rows, parts = {}, None
    for name in HOOKS:
        parts = start(folder, tiny_model, LOSSES[name], monkeypatch)
        beginning = parts.data.state_dict()
        (update,) = updates_of(parts, 1)
        rows[name] = update.samples
        parts.data.load_state_dict(beginning)
        (again,) = updates_of(parts, 1)
        for one, two in zip(update.samples, again.samples, strict=True):
            np.testing.assert_array_equal(one.token_ids, two.token_ids)
    assert parts is not None
    chat = parts.data._chat
    empty = chat.encode_prompt([{"role": "user", "content": ""}])
    for full, bare in zip(rows["empty prompt"], rows["no context"], strict=True):
        assert full.token_ids[: len(empty)].tolist() == empty
        np.testing.assert_array_equal(full.token_ids[len(empty) :], bare.token_ids)
        assert (bare.source == Source.EXPERT).all()
        assert bare.weights.tolist() == [0.0] + [1.0] * (len(bare) - 1)
    for masked, random in zip(rows["mask token"], rows["random token"], strict=True):
        read = masked.token_ids != masked.labels
        assert set(masked.token_ids[read].tolist()) <= {0}
        np.testing.assert_array_equal(masked.labels, random.labels)


def test_another_step_masks_other_tokens(folder, tiny_model, monkeypatch):
    parts = start(folder, tiny_model, LOSSES["mask token"], monkeypatch)
    prompts = parts.data.take(6)
    plan = parts.algorithm.plan(prompts, (), 1)
    one, two = (parts.algorithm.assemble(plan, (), step)[0].samples for step in (1, 2))
    assert any((a.token_ids != b.token_ids).any() for a, b in zip(one, two, strict=True))


def test_data_without_rejected_responses_is_refused(folder, tiny_model, monkeypatch):
    recipe = load(folder, tiny_model, LOSSES["redi"], monkeypatch, data={"path": "bare.jsonl"})
    with pytest.raises(DataError, match=r"data\.columns\.rejected"):
        check_inputs(recipe)


def test_a_group_beyond_the_budget_is_refused_by_name(folder, tiny_model, monkeypatch):
    learner = {"max_tokens_per_micro_batch": 64}
    rollouts = {"max_prompt_length": 48, "max_response_length": 16}
    recipe = load(
        folder, tiny_model, LOSSES["redi"], monkeypatch, learner=learner, rollouts=rollouts
    )
    with pytest.raises(DataError, match=r"'sum\d+' \(\d+ tokens\)"):
        load_prompts(check_inputs(recipe), str(tiny_model))


def test_a_mask_token_outside_the_vocabulary_is_refused(folder, tiny_model, monkeypatch):
    hook = {**MASKED, "mask_token_id": 10**6}
    parts = start(folder, tiny_model, {"type": "nll", "input_hook": hook}, monkeypatch)
    with pytest.raises(ConfigError, match="mask_token_id"):
        updates_of(parts, 1)


@pytest.mark.parametrize(
    ("algorithm", "problem"),
    [
        ({"type": "chord", "expert_loss": {"type": "redi"}}, "stand alone"),
        ({"type": "uft", "expert_loss": {"input_hook": {"type": "qfft"}, "type": "nll"}}, "alone"),
        ({"expert_loss": {"type": "nll", "input_hook": {**MASKED}}}, "mask_token_id"),
        (
            {"expert_loss": {"type": "token_cleaning", "input_hook": {"type": "qfft"}}},
            "unchanged input",
        ),
        (
            {"expert_loss": {"type": "redi"}, "data_selection": {"type": "rollout_filter"}},
            "data_selection",
        ),
    ],
)
def test_unfit_recipes_are_refused(algorithm, problem, folder, tiny_model, monkeypatch):
    monkeypatch.chdir(folder)
    recipe = tiny_recipe(tiny_model, data={"path": "pairs.jsonl"})
    recipe["algorithm"] = {"type": "sft", **algorithm}
    with pytest.raises(ConfigError, match=problem):
        load_recipe(write_recipe(folder, "unfit.yaml", recipe))


def test_paired_rows_are_one_unit(folder, tiny_model, monkeypatch):
    parts = start(folder, tiny_model, LOSSES["redi"], monkeypatch)
    (update,) = updates_of(parts, 0)
    batch = collate(update.samples)
    cuts = [
        rows
        for num_ranks, budget in ((1, 130), (2, 130), (3, 200))
        for plan in partition(batch, num_ranks, budget).plans
        for rows in plan
    ]
    # `plait check loss` moves rows about by itself.
    cuts += [rows for plan in micro_batchings(together(batch)).values() for rows in plan]
    cuts += [joined(part) for parts in placements(batch).values() for part in parts]
    for rows in cuts:
        inside = {batch.group_names[row] for row in rows}
        outside = set(range(batch.num_rows)) - set(rows)
        assert inside.isdisjoint(batch.group_names[row] for row in outside)
    with pytest.raises(DataError, match=r"prompt 'sum\d+'.*max_tokens_per_micro_batch = 40"):
        partition(batch, 1, 40)
