"""Stages: the config of each stage is its algorithm's own, and every hook goes to the stage of the step."""

from typing import Any

import pytest
import yaml

from plait.algorithms import ALGORITHMS, resolve
from plait.engine.errors import ConfigError
from plait.engine.types import UpdateReport
from plait.launch.config import load_recipe
from steps import PROMPTS, SETUP, answer

RECIPE: dict[str, Any] = {
    "model": "some/model",
    "data": {"type": "jsonl", "path": "data.jsonl"},
    "reward": "math",
    "rollouts": {"max_response_length": 64},
    "loop": {"steps": 6},
}
SFT, GRPO = {"type": "sft"}, {"type": "grpo", "rollouts_per_prompt": 2}


def load(tmp_path, *stages, **algorithm):
    file = tmp_path / "staged.yaml"
    section = {"type": "stages", "stages": list(stages), **algorithm}
    file.write_text(yaml.safe_dump({**RECIPE, "algorithm": section}))
    return load_recipe(file)


def build(*stages: dict[str, Any]) -> Any:
    cls = resolve("stages")
    section = {"stages": list(stages), "max_response_length": 12}
    return cls(cls.Config.model_validate(cls.Config.with_limit(section, 12)), SETUP)


def test_each_stage_has_the_config_of_its_algorithm(tmp_path):
    recipe = load(tmp_path, {"steps": 2, "algorithm": SFT}, {"algorithm": GRPO})
    sft, grpo = recipe.algorithm.sections.values()
    assert type(sft) is ALGORITHMS["sft"].Config
    assert (grpo.type, grpo.max_response_length) == ("grpo", 64)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml())
    assert load_recipe(resolved) == recipe


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            [{"steps": 2, "algorithm": {**SFT, "entropy_coeff": 1}}, {"algorithm": GRPO}],
            ["algorithm.stages.0.algorithm.entropy_coeff = 1", "did you mean 'entropy_coef'"],
        ),
        (
            [{"steps": 2, "algorithm": SFT}, {"algorithm": {"type": "grop"}}],
            ["algorithm.stages.1.algorithm.type = 'grop'", "no such algorithm"],
        ),
        (
            [{"steps": 2, "algorithm": SFT}, {"algorithm": {"type": "stages", "stages": []}}],
            ["algorithm.stages.1.algorithm.type", "cannot have stages"],
        ),
        ([{"step": 2, "algorithm": SFT}], ["algorithm.stages.0.step", "did you mean 'steps'"]),
        ([{"steps": 2}], ["algorithm.stages.0.algorithm", "required"]),
        ([{"algorithm": SFT}, {"algorithm": GRPO}], ["every stage but the last needs steps"]),
        ([{"steps": 6, "algorithm": SFT}, {"algorithm": GRPO}], ["begin after 6 steps", "loop.steps = 6"]),
        (
            [{"steps": 2, "algorithm": {**SFT, "max_response_length": 8}}, {"algorithm": GRPO}],
            ["(8, 64) must be the run's 64"],
        ),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_place(tmp_path, stages, words):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *stages)
    for word in words:
        assert word in str(caught.value)


def test_an_algorithm_of_the_users_own_can_be_a_stage(tmp_path, monkeypatch):
    (tmp_path / "own_stage.py").write_text(
        "from typing import Literal\nfrom plait.algorithms.grpo import Grpo, GrpoConfig\n"
        "class OwnConfig(GrpoConfig):\n    type: Literal['own_stage:Own'] = 'own_stage:Own'\n    own: int = 1\n"
        "class Own(Grpo):\n    Config = OwnConfig\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = {"type": "own_stage:Own", "own": 3}
    recipe = load(tmp_path, {"steps": 1, "algorithm": SFT}, {"algorithm": own})
    staged: Any = recipe.build_algorithm()
    assert staged.members[1].config.own == 3


def run_step(staged, step):
    plan = staged.plan(PROMPTS, [], step)
    groups = answer(plan.requests, {"a": (1, 0), "b": (0, 1), "c": (0, 0)})
    return staged.assemble(plan, groups, step)


def test_hooks_go_to_the_stage_of_the_step():
    staged = build({"steps": 2, "algorithm": SFT}, {"algorithm": GRPO})
    assert staged.every_prompt_demonstrated
    assert set(staged.losses) == set(staged.needs) == {"0.main", "1.main"}
    updates = [run_step(staged, step)[0] for step in range(4)]
    assert [update.loss for update in updates] == ["0.main", "0.main", "1.main", "1.main"]
    assert [len(update.samples) for update in updates] == [3, 3, 6, 6]
    assert staged.metrics() == {"stage": 1}


def test_schedules_of_a_stage_begin_with_it():
    chord = {
        "type": "chord",
        "rollouts_per_prompt": 2,
        "expert_rows_per_step": 5,
        "mu_peak": 0.9,
        "mu_decay_steps": 4,
    }
    staged = build({"steps": 3, "algorithm": GRPO}, {"algorithm": chord})
    assert [staged.expert_rows(step) for step in (2, 3)] == [0, 5]
    assert run_step(staged, 3)[0].coefs["mu"] == 0.9


def test_feedback_and_state_belong_to_the_stage():
    sasr = {"type": "sasr", "warmup_steps": 1, "rollouts_per_prompt": 2}
    stages = ({"steps": 1, "algorithm": GRPO}, {"algorithm": sasr})
    staged = build(*stages)
    run_step(staged, 0)
    run_step(staged, 1)
    staged.observe(UpdateReport("1.sft", 4.0, {}, 1e-3))
    alone = resolve("sasr")
    alone = alone(alone.Config.model_validate({**sasr, "max_response_length": 12}), SETUP)
    alone.plan(PROMPTS, [], 0)
    alone.observe(UpdateReport("sft", 4.0, {}, 1e-3))
    assert staged.state_dict()["stages"] == [{}, alone.state_dict()]
    again = build(*stages)
    again.load_state_dict(staged.state_dict())
    assert again.state_dict() == staged.state_dict()


def test_the_reference_of_a_later_stage_is_its_beginning():
    grpo = {**GRPO, "kl_coef": 0.1}
    moves = build({"steps": 1, "algorithm": SFT}, {"algorithm": grpo})
    assert [run_step(moves, step)[0].refresh_reference for step in range(3)] == [False, True, False]
    resumed = build({"steps": 1, "algorithm": SFT}, {"algorithm": grpo})
    resumed.load_state_dict(moves.state_dict())
    assert not run_step(resumed, 3)[0].refresh_reference, "once, whatever is resumed"
    stays = build({"steps": 1, "algorithm": SFT}, {"algorithm": grpo, "refresh_reference": False})
    assert not any(run_step(stays, step)[0].refresh_reference for step in range(3))


def test_tokens_are_drawn_in_one_way():
    draws = {"type": "one_token_rollout", "samples_per_token": 8}
    assert (
        build({"steps": 1, "algorithm": draws}, {"algorithm": GRPO}).token_sampling.num_samples == 8
    )
    with pytest.raises(ConfigError, match=r"algorithm.stages.1.algorithm.type"):
        build({"steps": 1, "algorithm": draws}, {"algorithm": {**draws, "samples_per_token": 9}})
