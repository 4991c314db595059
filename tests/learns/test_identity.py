"""Every registered algorithm learns the identity task from a random model, and does so twice in the same way.

Demonstrations have one piece, so methods that show pieces as hints (uft, ghpo, regft) learn here by their RL part.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from learns.identity import Outcome, make_model, run
from plait.algorithms import ALGORITHMS

STEPS, RATE = 40, 5e-3
CHANCE, LEARNED = 0.15, 0.9
SECTIONS: dict[str, dict[str, Any]] = {
    "amft": {"warmup_steps": 4, "meta_every": 10, "validation_prompts": 4},
    # Fewer demonstrations a step than prompts, and a schedule that ends within the run.
    "chord": {"expert_rows_per_step": 8, "mu_decay_steps": 20},
    # Flat enough to draw each symbol at a cold start; a penalty for misses then teaches the end token only.
    "one_token_rollout": {"sampling_temperature": 5.0, "miss_reward": 0.0},
    # One answer is right: in larger sets a wrong one beside right ones pays more than another right one.
    "polychromic": {"set_size": 2},
    "relift": {"expert_batch_size": 4},
    "sasr": {"warmup_steps": 10},
    "stages": {
        "stages": [{"steps": 10, "algorithm": {"type": "sft"}}, {"algorithm": {"type": "grpo"}}]
    },
    "topr": {"reward_baseline": 0.1},  # rewards are 0 and 1: wrong rows must be pushed down
    "uft": {
        "rollouts_per_prompt": 16
    },  # with 8, two of the symbols are never hit before their groups are all alike
}
"""Where a method's defaults are made for long runs of large models."""
MORE_STEPS = {"srft": 60}
"""Methods that are slower here than the others."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("identity") / "model")


def learn(name: str, model, folder) -> Outcome:
    section = {"type": name, **SECTIONS.get(name, {})}
    return run(model, folder, section, MORE_STEPS.get(name, STEPS), RATE)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_learns_from_a_cold_start_and_again_to_the_bit(name, model, tmp_path):
    one, other = (learn(name, model, tmp_path / part) for part in ("one", "other"))
    assert one.before < CHANCE
    assert one.after > LEARNED
    assert one.metrics == other.metrics
    assert one.weights.keys() == other.weights.keys()
    for parameter, weight in one.weights.items():
        assert torch.equal(weight, other.weights[parameter]), parameter
