"""Expert losses on the way of a real run: columns of a JSONL file, tokenizer, loop, DeepSpeed in process."""

from __future__ import annotations

import json
from math import isfinite
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from expert_cases import STEPS
from plait.engine.learner import LearnerWorker, Rank, WeightRoute
from plait.engine.learners import InProcessRank, LearnerGroup
from plait.engine.loop import apply_update
from plait.launch.config import load_recipe
from plait.launch.run import check_inputs, load_prompts

RECIPE = """
algorithm: {type: sft}
data: {type: jsonl}
eval: {num_prompts: 0}
rollouts: {max_prompt_length: 64, max_response_length: 24}
learner: {learning_rate: 1.0e-2, max_tokens_per_micro_batch: 2048}
loop: {steps: 2, prompts_per_step: 4, prompts_per_minibatch: 2}
"""
METRICS = {
    "asft": "expert_kl",
    "eaft": "expert_weight_mean",
    "glow": "expert_weight_mean",
    "token_weight": "expert_weight_mean",
    "token_cleaning": "expert_kept_fraction",
    "sstoken": "expert_kept_fraction",
    "forgetting": "expert_negative_coef",
    "topr": "taper_mean",
    "rift": "expert_loss",
}


@pytest.fixture(scope="module")
def rows(tiny_model):
    """What a user would write: numbers for each token that plait's own encoding gives."""
    from transformers import AutoTokenizer

    from plait.rollouts.chat import ChatFormat

    chat = ChatFormat(AutoTokenizer.from_pretrained(tiny_model))
    rng = np.random.default_rng(0)
    found = []
    for i in range(8):
        question, text = f"{i} + {i} =", f"Take {i} twice. So {2 * i}."
        prompt = chat.encode_prompt([{"role": "user", "content": question}])
        n = len(chat.encode_response(prompt, text))
        found.append(
            {
                "prompt": question,
                "demonstration": text,
                "demonstration_score": float(i % 2) * 2 - 1,
                "token_weights": rng.choice([0.0, 0.5, 1.0], n).tolist(),
                "prompt_attention": rng.uniform(size=n).tolist(),
                **{
                    name: rng.normal(-5.7, 0.3, n).tolist()
                    for name in ("base_logprobs", "history_logprobs", "behaviour_logprobs")
                },
            }
        )
    return found


def two_steps(folder, model, rows, loss: dict[str, Any], **learner: Any):
    """Reports of two loop steps, and the algorithm afterwards."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = yaml.safe_load(RECIPE)
    recipe["model"] = str(model)
    recipe["data"]["path"] = str(folder / "rows.jsonl")
    recipe["algorithm"]["expert_loss"] = loss
    recipe["learner"] |= learner
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(folder / "recipe.yaml")
    inputs = check_inputs(loaded)
    data, algorithm = load_prompts(inputs, str(model)), inputs.algorithm
    worker = LearnerWorker(
        str(model),
        loaded.learner,
        algorithm.losses,
        algorithm.needs,
        Rank(),
        algorithm.token_sampling,
        entropy_top_k=algorithm.entropy_top_k,
    )
    learners = LearnerGroup(
        InProcessRank(worker),
        loaded.learner,
        algorithm.needs,
        total_steps=2,
        seed=0,
        route=WeightRoute("shared_memory", "float32", 60.0),
    )
    parts: Any = SimpleNamespace(algorithm=algorithm, learners=learners)
    reports = []
    for step in range(2):
        plan = algorithm.plan(data.take(4), (), step)
        for update in algorithm.assemble(plan, (), step):
            reports += apply_update(parts, update, step)
    return reports, algorithm


def loss_of(kind: str) -> dict[str, Any]:
    return {"type": kind, **(STEPS if kind == "forgetting" else {})}


@pytest.mark.parametrize("kind", METRICS)
def test_it_trains_from_a_file(tmp_path, tiny_model, rows, kind):
    reports, algorithm = two_steps(tmp_path, tiny_model, rows, loss_of(kind))
    assert len(reports) == 4
    for report in reports:
        assert report.applied
        assert report.grad_norm > 0
        assert METRICS[kind] in report.metrics
        assert all(isfinite(value) for value in report.metrics.values())
    weights = [w for row in rows for w in row["token_weights"]]
    assert sum(r.tokens["expert"] for r in reports) == sum(w != 0 for w in weights)
    assert len(algorithm.expert_memory) == (8 if kind == "glow" else 0)
    if kind == "asft":
        first, *_, last = (report.metrics["expert_kl"] for report in reports)
        assert abs(first) < 1e-5
        assert last > 1e-4


@pytest.mark.parametrize("kind", METRICS)
def test_micro_batches_change_nothing(tmp_path, tiny_model, rows, kind):
    whole, _ = two_steps(tmp_path, tiny_model, rows, loss_of(kind))
    parts, _ = two_steps(tmp_path, tiny_model, rows, loss_of(kind), logit_chunk_tokens=5)
    for one, other in zip(whole, parts, strict=True):
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-3)
        assert other.metrics == pytest.approx(one.metrics, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_zero_stages_agree_on_the_kl_to_the_reference(tmp_path, tiny_model, rows, zero_stage):
    plain, _ = two_steps(tmp_path, tiny_model, rows, {"type": "asft", "kl_coef": 1.0})
    sharded, _ = two_steps(
        tmp_path, tiny_model, rows, {"type": "asft", "kl_coef": 1.0}, zero_stage=zero_stage
    )
    for one, other in zip(plain, sharded, strict=True):
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-3)
        assert other.metrics["expert_kl"] == pytest.approx(one.metrics["expert_kl"], abs=1e-5)


def test_stored_reference_log_probs_are_used_as_they_are(tmp_path, tiny_model, rows):
    """With ref = base the ranking keeps the first tokens; the frozen reference would choose others."""
    stored = [{**row, "ref_logprobs": row["base_logprobs"]} for row in rows]
    loss = {"type": "token_cleaning"}
    own, _ = two_steps(tmp_path, tiny_model, rows, loss)
    given, _ = two_steps(tmp_path, tiny_model, stored, loss)
    assert own[0].metrics["expert_kept_fraction"] == given[0].metrics["expert_kept_fraction"]
    assert own[0].metrics["expert_loss"] != given[0].metrics["expert_loss"]
