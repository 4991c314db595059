"""Every registered algorithm trains the tiny model: real vLLM, real DeepSpeed in process, the real loop."""

from __future__ import annotations

import json
from functools import partial
from math import isfinite

import pytest

from end_to_end.command_line import no_verifier, read_lines, tiny_recipe, write_recipe
from plait.algorithms import ALGORITHMS
from plait.engine.checkpoint import Checkpoints
from plait.engine.learner import LearnerWorker, Rank, WeightRoute
from plait.engine.learners import InProcessRank, LearnerGroup
from plait.engine.loop import Parts, train
from plait.engine.metrics import RunLog
from plait.engine.sync_proof import Tolerance
from plait.launch.ask import ask, find_question
from plait.launch.config import load_recipe
from plait.launch.console import PlainConsole
from plait.launch.run import check_inputs, load_prompts
from plait.rewards.scorer import ProcessScorer
from plait.rollouts.pool import Pool

STEPS, MAX_RESPONSE = 3, 24
CONFIGS = {
    "amft": {"warmup_steps": 1, "meta_every": 2, "validation_prompts": 2},
    "bread": {"failure_threshold": 1.0, "probe_rollouts": 2},
    "chord": {"expert_rows_per_step": 4},
    "ghpo": {"failure_threshold": 1.0},
    "grpo": {"drop_uniform_groups": True, "refill_rounds": 1},
    "polychromic": {"set_size": 2},
    "regft": {"pass_rate_threshold": 1.0, "hint_fraction": 0.5},
    "ppo": {"critic_warmup_steps": 1},
    "relift": {"expert_batch_size": 2},
    "sasr": {"warmup_steps": 1},
    "one_token_rollout": {"samples_per_token": 8},
    "stages": {
        "stages": [
            {"steps": 1, "algorithm": {"type": "sft"}},
            {"algorithm": {"type": "grpo", "rollouts_per_prompt": 3, "kl_coef": 0.01}},
        ]
    },
}
"""What an algorithm needs to show all of itself in three steps."""
SEVERAL_ROUNDS = ("bread", "ghpo", "grpo", "regft")


SELECTIONS = {
    "q_tuning": {},
    "uds": {"keep_rows": 2},
    "lobass": {},
    "self_response": {"max_candidates": 2},
    "rollout_filter": {"rollouts_per_prompt": 3},
}
"""Rules that choose what sft trains."""


@pytest.fixture(scope="module")
def pool(ray_session, tiny_model, work_folder):
    recipe = tiny_recipe(tiny_model, rollouts={"max_response_length": MAX_RESPONSE})
    config = load_recipe(work_folder / write_recipe(work_folder, "pool.yaml", recipe)).rollouts
    opened = Pool(str(tiny_model), config, dtype="float32", seed=0)
    opened.wait_started()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def demonstrations(work_folder):
    """Solutions of several sentences, so that there are pieces to hint with."""
    rows = [
        {
            "prompt": f"{i} + {j} =",
            "answer": str(i + j),
            "demonstration": f"Take {i}. Add {j}. So {i + j}.",
        }
        for i in range(8)
        for j in range(5)
    ]
    (work_folder / "solutions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def build(recipe, data):
    algorithm = recipe.build_algorithm()
    algorithm.use_prompts(data)
    return algorithm


@pytest.fixture
def train_tiny(pool, tiny_model, work_folder, demonstrations, monkeypatch):
    """(run's name, algorithm section) -> metrics of its steps."""
    monkeypatch.chdir(work_folder)
    return partial(train_section, pool, tiny_model, work_folder)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_trains(name, train_tiny):
    section = {"type": name, **CONFIGS.get(name, {})}
    if "rollouts_per_prompt" in ALGORITHMS[name].Config.model_fields:
        section["rollouts_per_prompt"] = 3
    train_tiny(name, section)


@pytest.mark.parametrize("kind", SELECTIONS)
def test_sft_trains_what_a_rule_selects(kind, train_tiny):
    rule = {"type": kind, **SELECTIONS[kind]}
    lines = train_tiny(f"sft-{kind}", {"type": "sft", "data_selection": rule})
    rows = [line for line in lines if "rows/expert" in line]  # the others are evaluations
    assert len(rows) == STEPS
    kept = [row["algorithm/selection_kept_rows"] for row in rows]
    assert kept[0] == {"q_tuning": 0.5, "uds": 0.5}.get(kind, kept[0])
    for row in rows:
        used = row["ledger/demonstrations_used"]
        assert used == pytest.approx(
            1 - row["algorithm/self_response_share"]
            if kind == "self_response"
            else row["algorithm/selection_kept_rows"]
        )


def train_section(pool, tiny_model, work_folder, name, section):
    """Three steps with every claim that holds for any algorithm."""
    recipe = tiny_recipe(
        tiny_model,
        run={"name": f"every-{name}"},
        data={"path": "solutions.jsonl", "hint_template": "{prompt} {hint}"},
        reward=no_verifier("parity:grade"),
        rollouts={"max_response_length": MAX_RESPONSE},
        loop={"steps": STEPS, "prompts_per_step": 4, "gradient_every": 1, "save_batch_every": 1},
        checkpoint={"every": 2},
    )
    recipe["algorithm"] = section
    loaded = load_recipe(write_recipe(work_folder, f"{name}.yaml", recipe))
    inputs = check_inputs(loaded)
    data = load_prompts(inputs, str(tiny_model))
    algorithm = build(loaded, data)
    worker = LearnerWorker(
        str(tiny_model),
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
        total_steps=STEPS,
        seed=0,
        route=WeightRoute("shared_memory", "float32", 60.0),
    )
    assert loaded.reward is not None
    scorer = ProcessScorer(loaded.reward, str(work_folder))
    folder = loaded.folder
    folder.mkdir(parents=True)
    parts = Parts(
        algorithm=algorithm,
        data=data,
        rollouts=pool,
        scorer=scorer,
        learners=learners,
        checkpoints=Checkpoints(folder / "checkpoints", loaded.checkpoint),
        log=RunLog(folder, PlainConsole()),
        probes=[data.eval_prompts[0].token_ids],
        tolerance=Tolerance.for_dtype("float32"),
    )
    try:
        state = train(loaded.loop, loaded.eval, loaded.sampling, parts)
    finally:
        scorer.close()
        learners.close()
    assert state.step == STEPS
    assert state.syncs == state.syncs_proved == state.policy_version + 1
    assert state.policy_version >= 1, "something was trained"
    rows = read_lines(folder / "metrics.jsonl")
    assert all(isfinite(value) for row in rows for value in row.values())
    if name in SEVERAL_ROUNDS:
        assert max(row["rollouts/rounds"] for row in rows if "rollouts/rounds" in row) > 1
    json.dumps(algorithm.state_dict())
    restored = build(loaded, data)
    restored.load_state_dict(json.loads(json.dumps(algorithm.state_dict())))
    assert restored.state_dict() == algorithm.state_dict()
    answers = ask(find_question(folder, f"{name}.yaml", str(tiny_model)), [section["type"]], None)
    assert {a.reason for a in answers} <= {None, "no row of this batch trains with it"}
    return rows
