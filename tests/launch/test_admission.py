"""Admission at the start of a run: what trains, what is refused, what a resumed run keeps; all is accounted for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from end_to_end.command_line import read_lines, tiny_recipe
from plait.engine.errors import DataError
from plait.engine.types import Prompt, Score
from plait.launch.admission import admit, choose_prompts, examine, report_of
from plait.launch.config import Recipe, validate
from plait.launch.run import check_inputs, load_prompts
from plait.rewards.exact import grade_exact

SFT = {"type": "sft"}


class Grader:
    """`exact`, in this process; counts what it is asked."""

    def __init__(self, unknown: Sequence[str] = ()) -> None:
        self.unknown = unknown
        self.texts: list[str] = []

    def grade(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return [
            replace(
                p,
                demonstrations=tuple(
                    replace(d, score=d.score or self.score(p, d.text)) for d in p.demonstrations
                ),
            )
            for p in prompts
        ]

    def score(self, prompt: Prompt, text: str) -> Score:
        self.texts.append(text)
        return Score.unknown("deadline") if text in self.unknown else grade_exact(prompt, text)


def rows_of(count: int, wrong: Sequence[int] = ()) -> list[dict[str, Any]]:
    return [
        {
            "id": str(i),
            "prompt": f"{i} + {i} =",
            "answer": str(2 * i),
            "demonstration": f"\\boxed{{{2 * i + (i in wrong)}}}",
        }
        for i in range(count)
    ]


@pytest.fixture
def start(tmp_path: Path, tiny_model: Path):
    """start(rows, grader, algorithm=..., **admission) -> (data, report): as the start of a run in the same folder."""

    def run(
        rows: list[dict[str, Any]],
        grader: Grader | None,
        algorithm: dict[str, Any] | None = None,
        **admission: Any,
    ) -> tuple[Any, Any]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = make_recipe(tiny_model, path, algorithm, admission)
        inputs = check_inputs(recipe)
        data = load_prompts(inputs, str(tiny_model))
        report = admit(recipe, inputs.algorithm, data, grader, tmp_path)  # pyright: ignore[reportArgumentType]
        return data, report

    return run


def make_recipe(
    model: Path, path: Path, algorithm: dict[str, Any] | None, admission: dict[str, Any]
) -> Recipe:
    raw = tiny_recipe(
        model,
        run={"name": "r"},
        reward="exact",
        data={"path": str(path), "admission": admission},
        loop={"steps": 2, "prompts_per_step": 2},
        eval={"num_prompts": 0},
    )
    raw["algorithm"] = algorithm or raw["algorithm"]
    return validate(raw)


def drawn(data: Any) -> dict[str, list[str]]:
    return {p.prompt_id: [d.text for d in p.demonstrations] for p in data.take(data.num_prompts)}


def test_wrong_ones_do_not_train_and_their_prompts_stay_for_rollouts(start, tmp_path) -> None:
    data, report = start(rows_of(8, wrong=[2, 5]), Grader(unknown=["\\boxed{6}"]))
    assert (data.num_prompts, data.num_experts) == (8, 6)
    assert {p.prompt_id for p in data.take_experts(6)} == {"0", "1", "3", "4", "6", "7"}
    assert (drawn(data)["2"], drawn(data)["1"]) == ([], ["\\boxed{2}"])
    assert (report.right, report.wrong, report.unknown, report.not_graded) == (5, 2, 1, 0)
    assert report.demonstrations == report.admitted + sum(report.dropped.values()) == 8
    scores = {
        p.prompt_id: [d.score and d.score.reward for d in p.demonstrations] for p in data.take(8)
    }
    assert scores["1"] == [1.0]
    assert scores["3"] == [None]  # UNKNOWN is asked for again where it is needed
    lines = read_lines(tmp_path / "quarantine.jsonl")
    assert sorted((x["prompt_id"], x["where"], x["reason"]) for x in lines) == [
        ("2", "demonstration 0", "wrong: reward 0"),
        ("5", "demonstration 0", "wrong: reward 0"),
    ]
    assert lines[0]["row"]["demonstration"].startswith("\\boxed{")
    assert report_of(tmp_path)["dropped"] == {"wrong": 2}


def test_where_every_prompt_trains_its_own_the_prompt_leaves_too(start, tmp_path) -> None:
    data, report = start(rows_of(8, wrong=[2, 5]), Grader(), SFT)
    assert (data.num_prompts, data.num_experts) == (6, 6)
    assert report.left_out == {"undemonstrated": 2}
    counts = data.report
    assert counts.rows == 8 == counts.kept + counts.held_out + sum(counts.dropped.values())
    assert counts.dropped == {"admission: undemonstrated": 2}
    reasons = [line["reason"] for line in read_lines(tmp_path / "quarantine.jsonl")]
    assert sum(reason.startswith("undemonstrated") for reason in reasons) == 2


def test_a_resumed_run_keeps_the_decision_and_grades_none_again(start, tmp_path) -> None:
    rows = rows_of(8, wrong=[2, 5])
    data, report = start(rows, Grader(unknown=["\\boxed{11}"]))  # 5 is wrong, but timed out
    data.take_experts(3)
    state = data.state_dict()
    expected = [p.prompt_id for p in data.take_experts(4)]
    quarantine = (tmp_path / "quarantine.jsonl").read_bytes()
    resumed = Grader()
    again, told = start(rows, resumed)
    assert resumed.texts == []
    assert told == report
    again.load_state_dict(state)
    prompts = again.take_experts(4)
    assert [p.prompt_id for p in prompts] == expected
    assert [p.demonstrations[0].score for p in prompts].count(None) <= 1
    assert (tmp_path / "quarantine.jsonl").read_bytes() == quarantine


def test_the_decision_belongs_to_its_data(start) -> None:
    start(rows_of(8, wrong=[7]), Grader())
    with pytest.raises(DataError, match=r"admission\.json was made for other data, of 8 training"):
        start(rows_of(7), Grader())


def test_a_broken_decision_is_named(start, tmp_path) -> None:
    (tmp_path / "admission.json").write_text("{}")
    with pytest.raises(DataError, match=r"admission\.json: not an admission"):
        start(rows_of(4), Grader())


def test_a_refusal_names_reason_row_and_remedy(start, tmp_path) -> None:
    rows = rows_of(4)
    rows[1]["demonstration"] = "[INST] \\boxed{2}"
    with pytest.raises(DataError) as caught:
        start(rows, Grader())
    text = str(caught.value)
    assert "data.admission.foreign_template = refuse, and 1 findings are of that kind" in text
    assert "1, demonstration 0: holds '[INST]'" in text
    assert "set data.admission.foreign_template to drop or keep" in text
    assert [line["prompt_id"] for line in read_lines(tmp_path / "quarantine.jsonl")] == ["1"]
    assert not (tmp_path / "admission.json").exists()
    data, _ = start(rows, Grader(), foreign_template="drop")
    assert data.num_experts == 3


def test_nothing_admitted(start) -> None:
    with pytest.raises(
        DataError, match=r"'chord' trains demonstrations, and none was admitted:\n4 de"
    ):
        start(rows_of(4, wrong=range(4)), Grader(), max_dropped_fraction=1)


def test_too_many_dropped(start) -> None:
    """The share of those that were graded counts: the others are as bad."""
    rows = rows_of(10, wrong=range(6))
    message = r"60% of the demonstrations are dropped, more than data\.admission\.max_dropped_fraction = 0\.5"
    with pytest.raises(DataError, match=message):
        start(rows, Grader())
    with pytest.raises(DataError, match=r"% of the 5 graded demonstrations are wrong, more than"):
        start(rows_of(20, wrong=range(20)), Grader(), max_graded=5)
    assert start(rows, Grader(), max_dropped_fraction=0.6)[0].num_experts == 4


def test_wrong_ones_train_where_the_loss_reads_their_reward(start) -> None:
    algorithm = {**SFT, "expert_loss": {"type": "rift"}}
    data, report = start(rows_of(4, wrong=[1]), Grader(), algorithm)
    assert (data.num_experts, report.wrong, report.dropped) == (4, 1, {})
    assert report.actions == {"wrong": "keep"}


def test_a_method_without_demonstrations_only_has_its_prompts_looked_at(start) -> None:
    rows = rows_of(4, wrong=[1])
    rows[2]["demonstration"] = "[INST]"
    rows[3]["prompt"] = rows[0]["prompt"]
    grader = Grader()
    data, report = start(rows, grader, {"type": "grpo", "rollouts_per_prompt": 2})
    assert grader.texts == []
    assert (data.num_prompts, report.demonstrations) == (4, 0)
    assert report.findings == {"duplicate_prompt": 1}


def test_the_budget_of_verdicts(start) -> None:
    rows = rows_of(20, wrong=range(0, 20, 2))
    grader = Grader()
    data, report = start(rows, grader, max_graded=6)
    assert len(grader.texts) == 6 == report.right + report.wrong
    assert report.not_graded == 14
    assert data.num_experts == 20 - report.wrong
    assert report.demonstrations == report.admitted + sum(report.dropped.values())


def test_the_draw_of_prompts_to_grade() -> None:
    ungraded = {str(i): 1 + i % 3 for i in range(50)}
    chosen = choose_prompts(ungraded, 20, seed=0)
    assert 18 <= sum(ungraded[name] for name in chosen) <= 20
    assert chosen == choose_prompts(ungraded, 20, seed=0) != choose_prompts(ungraded, 20, seed=1)
    assert choose_prompts(ungraded, None, 0) == list(ungraded)
    assert choose_prompts({}, 5, 0) == choose_prompts(ungraded, 0, 0) == []


def test_dropping_one_of_several_keeps_the_others_verdicts(tmp_path, tiny_model) -> None:
    """The scorer keeps verdicts for the run; a place that another text moves into must not inherit one."""
    from plait.launch.scoring import open_scorer

    rows = [
        {"id": "a", "prompt": "2 + 2 =", "answer": "4", "demonstration": ["5", "four", "4"]},
        {"id": "b", "prompt": "2 + 3 =", "answer": "5", "demonstration": ["5"]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(
        tiny_model, path, {"type": "srft", "rollouts_per_prompt": 2}, {"max_graded": 4}
    )
    inputs = check_inputs(recipe)
    with open_scorer(recipe) as scorer:
        data = load_prompts(inputs, str(tiny_model))
        admit(recipe, inputs.algorithm, data, scorer, tmp_path)
        prompt = data.find("a")
        (left,) = prompt.demonstrations
        assert left.text == "4"
        bare = replace(prompt, demonstrations=(replace(left, score=None),))
        (graded,) = scorer.grade([bare])
    assert graded.demonstrations[0].score == left.score == Score.ok(1.0, answer="4")


def test_examine_alone_changes_nothing(start, tmp_path, tiny_model) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(4, wrong=[1])))
    recipe = make_recipe(tiny_model, path, None, {})
    inputs = check_inputs(recipe)
    data = load_prompts(inputs, str(tiny_model))
    found = examine(recipe, inputs.algorithm, data, Grader())  # pyright: ignore[reportArgumentType]
    assert {*found.decision.dropped} == {("1", 0)}
    assert (data.num_prompts, data.num_experts, data.report.kept) == (4, 4, 4)
