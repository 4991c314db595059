"""`plait plan` counts what a method may ask for at worst: rounds, extra rows, extra phases."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from plait.algorithms import Setup, resolve
from plait.algorithms.step_size import Phase
from plait.engine.types import Sampling
from plait.launch.config import validate
from plait.launch.plan import Plan, make_plan

PROMPTS, GROUP, STEPS = 8, 4, 20
TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)


def plan(**algorithm: Any) -> Plan:
    if algorithm["type"] not in ("sft", "stages", "one_token_rollout"):
        algorithm = {"rollouts_per_prompt": GROUP, **algorithm}
    recipe = {
        "run": {"name": "planned"},
        "model": "somewhere",
        "algorithm": algorithm,
        "data": {"type": "jsonl", "path": "rows.jsonl"},
        "reward": "exact",
        "rollouts": {"max_prompt_length": 32, "max_response_length": 32},
        "learner": {"max_tokens_per_micro_batch": 128},
        "loop": {"steps": STEPS, "prompts_per_step": PROMPTS, "prompts_per_minibatch": 4},
    }
    return make_plan(validate(recipe), TINY)


@pytest.mark.parametrize(
    ("algorithm", "rollouts", "rounds", "rows", "expert_rows"),
    [
        ({"type": "sft"}, 0, 0, 8, 8),
        (
            {"type": "sft", "data_selection": {"type": "rollout_filter", "rollouts_per_prompt": 2}},
            16,
            1,
            8,
            8,
        ),
        ({"type": "grpo"}, 32, 1, 32, 0),
        ({"type": "grpo", "drop_uniform_groups": True, "refill_rounds": 3}, 128, 4, 32, 0),
        ({"type": "chord", "expert_rows_per_step": 6}, 32, 1, 38, 6),
        ({"type": "luffy"}, 32, 1, 32, 8),
        ({"type": "visurf", "expert_rows_per_group": 2}, 32, 1, 48, 16),
        ({"type": "hpt"}, 32, 1, 32, 8),
        ({"type": "super_rl"}, 32, 1, 32, 32),
        ({"type": "ghpo"}, 128, 4, 32, 0),
        ({"type": "bread", "max_pieces": 16, "probe_rollouts": 2}, 128, 6, 32, 0),
        ({"type": "bread", "max_pieces": 1}, 32, 1, 32, 0),
        ({"type": "regft", "max_kept_per_problem": 3}, 64, 2, 24, 24),
        ({"type": "sasr", "warmup_steps": 5}, 32, 1, 32, 0),
        ({"type": "sasr", "warmup_steps": 20}, 0, 0, 8, 8),
    ],
)
def test_the_widest_step(algorithm, rollouts, rounds, rows, expert_rows):
    result = plan(**algorithm)
    assert (result.rollouts, result.rounds) == (rollouts, rounds)
    assert (result.rows, result.expert_rows) == (rows, expert_rows)
    assert result.optimizer_steps == STEPS * 2
    assert result.max_tokens_per_rank == rows * 64


def test_relifts_extra_phases_come_as_often_as_the_buffer_can_fill():
    result = plan(type="relift", expert_batch_size=16, expert_epochs=3)
    assert result.phases == (Phase("main", 32, 2, 1), Phase("sft", 16, 1, 3))
    assert (result.rows, result.rows_per_minibatch) == (48, 16)
    # 160 prompts that all fail fill the buffer of 16 ten times.
    assert result.optimizer_steps == STEPS * 2 + 10 * 3


@pytest.mark.parametrize("name", ["sft", "sasr"])
def test_a_loss_that_compares_pairs_doubles_the_rows(name):
    cls = resolve(name)
    config = {"type": name, "expert_loss": {"type": "dpop"}, "warmup_steps": 5}
    fields = {key: value for key, value in config.items() if key in cls.Config.model_fields}
    algorithm = cls(cls.Config.model_validate(fields), Setup(Sampling(32)))
    assert algorithm.step_size(PROMPTS, 0).rows == 2 * PROMPTS


def test_stages_count_each_step_as_its_stage_does():
    ghpo = {"type": "ghpo", "rollouts_per_prompt": GROUP, "hint_start_step": 4}
    result = plan(
        type="stages", stages=[{"steps": 5, "algorithm": {"type": "sft"}}, {"algorithm": ghpo}]
    )
    assert (result.rollouts, result.rounds, result.rows) == (128, 4, 32)


def test_a_person_reads_the_same():
    text = "\n".join(plan(type="relift", expert_batch_size=16).lines())
    assert "8 prompts, <= 32 rollouts in <= 1 round(s)" in text
    assert "main: 32 rows in 2 minibatch(es) x 1 epoch(s), then sft: 16 rows" in text
