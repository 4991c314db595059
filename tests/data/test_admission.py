"""Findings about demonstrations, what the policy makes of them, and the data without what is dropped."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plait.engine.errors import DataError
from plait.engine.types import Prompt, Score
from plait.rollouts.admission import Examination
from plait.rollouts.admission_policy import (
    AdmissionConfig,
    Finding,
    Reason,
    choose_actions,
    decide,
)
from plait.rollouts.config import JsonlData
from plait.rollouts.data import Data, load_data
from plait.rollouts.overlap import COMMON, HeldOutText, hash_ngrams, words
from plait.rollouts.text_signs import is_invisible, template_markup, unfinished_part

LIMIT = 40


def load(folder: Path, tokenizer: Any, rows: list[dict[str, Any]]) -> Data:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": str(i)} | row) + "\n" for i, row in enumerate(rows)))
    config = JsonlData(type="jsonl", path=str(path))
    return load_data(
        config, tokenizer, num_eval=0, max_prompt_length=200, max_response_length=LIMIT
    )


def examine(data: Data, held_out: tuple[Prompt, ...] = ()) -> Examination:
    examination = Examination(held_out, LIMIT)
    for row in data.rows():
        examination.add(row)
    examination.finish()
    return examination


def found(data: Data) -> list[tuple[str, int | None, str]]:
    return [(f.prompt_id, f.place, f.reason.value) for f in examine(data).findings]


def row(text: str | list[str], number: int = 0, **columns: Any) -> dict[str, Any]:
    return {"prompt": f"{number} + 1 =", "answer": "1", "demonstration": text, **columns}


def says(text: str, prompt_id: str = "held") -> Prompt:
    return Prompt(prompt_id, ({"role": "user", "content": text},), (1,))


LONG = "one b c d e f g h i j k l m"


@pytest.mark.parametrize(
    ("demonstration", "reasons"),
    [
        ("fine", []),
        (["fine", "better"], []),
        ("\u200b\u2060 ", [(0, "empty")]),
        ("x " * 50, [(0, "too_long")]),
        (["fine", "a<|im_end|>b"], [(1, "control_token")]),
        (["a<|im_end|>b", "[INST] x"], [(0, "control_token"), (1, "foreign_template")]),
        ("so \\boxed{1", [(0, "no_end")]),
        (["fine", "fine"], [(1, "duplicate")]),
    ],
)
def test_faults_of_a_text(
    tmp_path: Path, tokenizer: Any, demonstration: Any, reasons: list[tuple[int, str]]
) -> None:
    data = load(tmp_path, tokenizer, [row(demonstration)])
    assert found(data) == [("0", *reason) for reason in reasons]


def test_finish_reasons_are_those_of_the_places_in_the_row(tmp_path: Path, tokenizer: Any) -> None:
    reasons = {"finish_reason": ["stop", "length", "length"]}
    rows = [
        row(["a<|im_end|>", "b", "c"], metadata=reasons),
        row("d", 1, metadata={"finish_reason": "max_tokens"}),
        row("e", 2, metadata={"finish_reason": "stop"}),
    ]
    data = load(tmp_path, tokenizer, rows)
    assert found(data) == [
        ("0", 0, "control_token"),
        ("0", 1, "no_end"),
        ("0", 2, "no_end"),
        ("1", 0, "no_end"),
    ]


def test_texts_and_prompts_that_come_twice(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        row(LONG),
        row(LONG.replace("one", "One"), 1),
        row(f" {LONG} ", 2),
        row("4", 3),
        row("4", 4),
        row("5", 4),
    ]
    data = load(tmp_path, tokenizer, rows)
    assert found(data) == [("2", 0, "duplicate"), ("5", None, "duplicate_prompt")]


def test_a_demonstration_without_a_weight_is_masked(tmp_path: Path, tokenizer: Any) -> None:
    text = "x" * 60
    data = load(tmp_path, tokenizer, [row(text)])
    (prompt,) = data.take(1)
    num = len(prompt.demonstrations[0].token_ids)
    none, beyond = [0.0] * num, [0.0] * LIMIT + [1.0] * (num - LIMIT)
    inside = [0.0] * (LIMIT - 1) + [1.0] * (num - LIMIT + 1)
    rows = [row(text, i, token_weights=w) for i, w in enumerate((none, beyond, inside))]
    data = load(tmp_path, tokenizer, rows)
    assert found(data) == [
        ("0", 0, "fully_masked"),
        ("1", 0, "fully_masked"),
        ("2", 0, "too_long"),
    ]


def test_scores_become_findings(tmp_path: Path, tokenizer: Any) -> None:
    rows = [row(["a", "b"], demonstration_score=[0.5, None]), row("c", 1), row("d", 2)]
    data = load(tmp_path, tokenizer, rows)
    examination = examine(data)
    for name, score in (("0", Score.ok(1)), ("1", Score.unknown("why"))):
        sure = data.row(name)
        demonstrations = [replace(d, score=d.score or score) for d in sure.prompt.demonstrations]
        examination.judge(sure, replace(sure.prompt, demonstrations=tuple(demonstrations)))
    assert [(f.prompt_id, f.place, f.reason, f.detail) for f in examination.findings] == [
        ("0", 0, Reason.WRONG, "reward 0.5"),
        ("1", 0, Reason.UNKNOWN, "why"),
    ]
    source = examination.sources["rows.jsonl"]
    assert (source.rows, source.demonstrations, source.stored) == (3, 4, 1)
    assert (source.right, source.wrong, source.unknown, source.not_graded) == (1, 1, 1, 1)
    assert examination.scores == {("0", 1): Score.ok(1)}


def test_the_policy_drops_keeps_and_refuses(tmp_path: Path, tokenizer: Any) -> None:
    rows = [row(["[INST]", "\u200b"]), row(["fine", "a<|im_end|>"], 1), row("ok", 1)]
    examination = examine(load(tmp_path, tokenizer, rows))

    def decided(every: bool = False, **policy: str) -> tuple[dict, dict, list]:
        actions = choose_actions(AdmissionConfig.model_validate(policy))
        decision = decide(
            examination.findings,
            examination.places,
            actions,
            every_prompt_demonstrated=every,
        )
        return {**decision.dropped}, {**decision.left_out}, [f.reason for f in decision.refused]

    dropped = {("0", 1): "empty", ("1", 1): "control_token"}
    assert decided() == (dropped, {}, ["foreign_template"])
    drop = {("0", 0): "foreign_template", **dropped}
    assert decided(foreign_template="drop") == (drop, {}, [])
    without = {("2", 0): "duplicate_prompt", ("1", 1): "control_token"}
    assert decided(foreign_template="keep", empty="keep", duplicate_prompt="drop") == (
        without, {"2": "duplicate_prompt"}, [],
    )  # fmt: skip
    assert decided(every=True, foreign_template="drop") == (drop, {"0": "undemonstrated"}, [])


def test_wrong_ones_are_kept_where_they_are_what_trains() -> None:
    findings = [Finding("a", 0, Reason.WRONG)]

    def dropped(keep: bool, **policy: str) -> bool:
        config = AdmissionConfig.model_validate(policy)
        actions = choose_actions(config, keep_wrong=keep)
        return bool(decide(findings, {"a": (0,)}, actions).dropped)

    assert dropped(False)
    assert not dropped(True)
    assert dropped(True, wrong="drop")
    assert not dropped(False, wrong="keep")


def test_admitted_data(tmp_path: Path, tokenizer: Any) -> None:
    rows = [row([f"a{i}", f"b{i}<|im_end|>", f"c{i}"], i) for i in range(6)]
    data = load(tmp_path, tokenizer, rows)
    dropped = [("0", 0), ("1", 0), ("1", 2)]
    data.admit(dropped, {"2": "eval_copy"}, {("0", 2): Score.ok(1)})
    report = data.report
    assert (report.rows, report.kept, report.with_demonstration) == (6, 5, 4)
    assert report.dropped == {"eval_copy": 1}
    assert report.rows == report.kept + report.held_out + sum(report.dropped.values())
    assert (data.num_prompts, data.num_experts) == (5, 4)
    assert {p.prompt_id for p in data.take(5)} == {"0", "1", "3", "4", "5"}
    assert {p.prompt_id for p in data.take_experts(4)} == {"0", "3", "4", "5"}
    first = data.row("0")
    assert (first.places, first.refused) == ((2,), {1: "b0<|im_end|>"})
    assert [(d.text, d.score) for d in first.prompt.demonstrations] == [("c0", Score.ok(1))]
    with pytest.raises(DataError, match="no training prompt has the id '2'"):
        data.find("2")
    with pytest.raises(DataError, match=r"no training prompt is left:\n6 rows"):
        data.admit((), dict.fromkeys("01345", "eval_copy"), {})


def test_text_signs() -> None:
    assert is_invisible("\u200b \n\ufeff")
    assert not is_invisible("\u200b.")
    for text in ("<|eot_id|>", "a [/INST] b", "<\uff5cUser\uff5c>", "<end_of_turn>", "x\n### Response: y",
                 "Assistant: 4", "a\n\nHuman: b"):  # fmt: skip
        assert template_markup(text), text
    for text in ("|x| < 3 > |y|", "### Step 1", "the Human: a study", "[inst]", "<b>"):
        assert template_markup(text) is None, text
    for text in ("\\boxed{\\frac{1}{2}", "```py\nx", "<think> so", "</think> <answer> 4"):
        assert unfinished_part(text), text
    for text in ("\\boxed{\\}}", "```\nx\n```", "so</think> 4", "\\boxed{1", "{"):
        assert (unfinished_part(text) is None) == (text != "\\boxed{1"), text


def test_ngrams_of_words() -> None:
    assert words(says("What is (9 + 4)?  Say  IT.")) == ["what", "is", "9", "+", "4", "say", "it"]
    assert len(hash_ngrams([str(i) for i in range(20)])) == 8
    assert len(hash_ngrams(["a", "b"])) == len(hash_ngrams([])) == 1


def test_overlap_with_held_out_text() -> None:
    held = [str(i) for i in range(20)]
    text = HeldOutText([says(" ".join(held)), says("two words", "short")])
    copy = text.add(says(" ".join(held).upper() + ".", "copy"))
    assert copy is not None
    assert (copy.share, copy.held_out) == (1.0, "held")
    inside = text.add(says(" ".join(held[2:17]), "inside"))
    assert inside is not None
    assert inside.share == 1.0
    short = text.add(says("Two words!", "brief"))
    assert short is not None
    assert short.held_out == "short"
    for prompt_id, said in (
        ("half", " ".join([*held[:14], *"abcdefghijklmn"])),
        ("twelve", " ".join([*held[:12], "a", *held[13:]])),
        ("none", "something else"),
    ):
        assert text.add(says(said, prompt_id)) is None
    (partial,) = text.partial()
    assert (partial.prompt_id, partial.held_out) == ("half", "held")
    assert partial.share == pytest.approx(2 / 16)


def test_the_wording_of_a_template_is_no_overlap() -> None:
    frame = " ".join(f"w{i}" for i in range(13))
    text = HeldOutText([says(f"{frame} x1 x2 x3")])
    for i in range(COMMON + 1):
        assert text.add(says(f"{frame} {i} {i + 1}", str(i))) is None
    assert list(text.partial()) == []


def test_nothing_held_out() -> None:
    text = HeldOutText([])
    assert text.add(says("a")) is None
    assert list(text.partial()) == []
