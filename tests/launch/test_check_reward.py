"""The gold test finds verifiers that miss right answers or take wrong ones; UNKNOWN scores can be tried again."""

import json
from pathlib import Path

import pytest

from plait.engine.errors import RewardError
from plait.launch.check_reward import check_reward, refuse_untrue, replay, replay_lines
from plait.launch.config import Recipe, load_recipe
from plait.launch.run import check_inputs
from plait.launch.scoring import open_scorer
from plait.rewards.gold import corrupt_answer

REWARDS = """
def boxed_only(prompt, completion):
    return float(completion.endswith("boxed{%s}" % prompt.answer))
def always(prompt, completion):
    return 1.0
def solution_only(prompt, completion):
    return float(completion.endswith(f"twice: {prompt.answer} it is."))
def never(prompt, completion):
    return 0.0
def cannot_tell(prompt, completion):
    raise ValueError("no idea")
def sleepy(prompt, completion, *, awake=False):
    if not awake:
        return None
    return float(prompt.answer in completion)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} + {i}?", "answer": str(2 * i)} for i in range(40)]
    write_rows(tmp_path, rows)
    (tmp_path / "checked_rewards.py").write_text(REWARDS)
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tiny_model}\nalgorithm: {{type: grpo}}\ndata: {{type: jsonl, path: rows.jsonl}}\n"
        "reward: exact\nloop: {steps: 1, prompts_per_step: 4}\neval: {num_prompts: 4}\n"
    )
    return tmp_path


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(function: str, **reward: object) -> Recipe:
    section = json.dumps({"function": function, "num_workers": 1, **reward})
    return load_recipe("recipe.yaml", [f"reward={section}"])


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("function", "form"),
    [
        ("exact", "{answer}"),
        ("math", "{answer}"),
        ("boxed_math", "\\boxed{{answer}}"),
        ("checked_rewards:boxed_only", "\\boxed{{answer}}"),
    ],
)
def test_true_verifiers_pass_in_the_form_they_read(function: str, form: str) -> None:
    report = check_reward(recipe(function))
    assert (report.form, len(report.gold), len(report.corrupted)) == (form, 20, 20)
    assert report.passes(0.0)
    assert "20 of 20 gold answers right, 20 of 20 corrupted ones wrong" in report.lines()[0]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("function", "missed", "fooled"),
    [("always", 0, 20), ("never", 20, 0), ("cannot_tell", 5, 5)],
)
def test_untrue_verifiers_are_found_and_stop_a_run(function: str, missed: int, fooled: int) -> None:
    loaded = recipe(f"checked_rewards:{function}")
    report = check_reward(loaded)
    assert (len(report.missed), len(report.fooled)) == (missed, fooled)
    assert not report.passes(0.1)
    records = check_inputs(loaded).records
    assert loaded.reward is not None
    with open_scorer(loaded) as scorer, pytest.raises(RewardError, match="verdict is known"):
        refuse_untrue(scorer, loaded.reward, records)
    off = recipe(f"checked_rewards:{function}", gold_samples=0)
    assert off.reward is not None
    with open_scorer(off) as scorer:
        assert refuse_untrue(scorer, off.reward, records) == []


def test_demonstrations_are_corrupted_at_their_answer(folder: Path) -> None:
    rows = [
        {"prompt": f"{i}?", "answer": str(i), "demonstration": f"Half of {i} twice: {i} it is."}
        for i in range(10)
    ]
    write_rows(folder, rows)
    report = check_reward(recipe("checked_rewards:solution_only"))
    assert report.form == "demonstration"
    assert report.passes(0.0)
    assert {v.completion for v in report.corrupted} <= {
        f"Half of {i} twice: {i} it is." for i in range(11)
    }


def test_nothing_to_test_is_said(folder: Path) -> None:
    write_rows(folder, [{"prompt": f"Write poem {i}"} for i in range(10)])
    report = check_reward(recipe("checked_rewards:always"))
    assert report.lines() == [
        "gold test: no prompt has an answer or a demonstration, nothing to test"
    ]


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        ("12", "13"),
        ("-3", "-4"),
        ("0.5", "1.5"),
        ("\\frac{3}{4}", "\\frac{3}{5}"),
        ("(D)", "(E)"),
        ("True", "False"),
        ("cat", "dog"),
        ("dog", "not dog"),
    ],
)
def test_corrupted_answers_differ(answer: str, wrong: str) -> None:
    assert corrupt_answer(answer, ["dog"]) == wrong


def test_replay_grades_unknown_scores_again(folder: Path) -> None:
    run = folder / "runs" / "one"
    run.mkdir(parents=True)
    loaded = recipe("checked_rewards:sleepy")
    (run / "config.yaml").write_text(loaded.to_yaml())
    kept = [("rows.jsonl/3", "4"), ("rows.jsonl/4", "0")]
    lines = [
        {
            "prompt_id": p,
            "index": 0,
            "completion": c,
            "reward": loaded.reward.function,
            "reason": "deadline",
        }
        for p, c in kept
        if loaded.reward
    ]
    (run / "unknown_rewards.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    still = replay(run, loaded)
    assert replay_lines(still)[0] == "2 x deadline: now 0 right, 0 wrong, 2 UNKNOWN"
    awake = recipe("checked_rewards:sleepy", options={"awake": True})
    assert replay_lines(replay(run, awake)) == ["2 x deadline: now 1 right, 1 wrong, 0 UNKNOWN"]
