"""The data source: split, report, streams, resume."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from plait.engine.contracts import DataSource
from plait.engine.errors import DataError
from plait.rollouts.config import JsonlData, ReasoningGymData
from plait.rollouts.data import Data, load_data
from plait.rollouts.readers import read_records

Rows = Sequence[dict[str, Any]]


def jsonl(folder: Path, rows: Rows, **config: Any) -> JsonlData:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonlData(type="jsonl", path=str(path), **config)


def sums(n: int, every: int = 1) -> Rows:
    """`n` rows; each so many has a demonstration."""
    return [
        {"prompt": f"{i} + 1 =", "answer": str(i + 1)}
        | ({"demonstration": f"It is {i + 1}"} if i % every == 0 else {})
        for i in range(n)
    ]


def load(config: Any, tokenizer: Any, num_eval: int = 0, **limits: int) -> Data:
    lengths: dict[str, Any] = {"max_prompt_length": 64, "max_response_length": 32} | limits
    return load_data(config, tokenizer, num_eval=num_eval, **lengths)


def ids(prompts: Sequence[Any]) -> list[str]:
    return [prompt.prompt_id for prompt in prompts]


def test_prompts_carry_everything(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": "2+2?", "answer": 4, "demonstration": "4", "reward": "exact", "id": "x"}
    data: DataSource = load(jsonl(tmp_path, [row | {"metadata": {"a": [1]}}]), tokenizer)
    (prompt,) = data.take(1)
    assert (prompt.prompt_id, prompt.answer, prompt.reward) == ("x", "4", "exact")
    assert prompt.metadata == {"a": [1]}
    assert tokenizer.decode(prompt.token_ids).endswith("2+2?<|im_end|>\n<|im_start|>assistant\n")
    (demonstration,) = prompt.demonstrations
    assert tokenizer.decode(demonstration.token_ids) == "4<|im_end|>"
    assert (demonstration.text, demonstration.origin) == ("4", "rows.jsonl")
    assert (demonstration.columns, demonstration.score) == ({}, None)


def test_streams_have_their_own_order_and_position(tmp_path: Path, tokenizer: Any) -> None:
    data = load(jsonl(tmp_path, sums(12)), tokenizer)
    prompts = [ids(data.take(4)) for _ in range(6)]
    experts = [ids(data.take_experts(4)) for _ in range(6)]
    for epoch in (prompts[:3], prompts[3:], experts[:3], experts[3:]):
        assert len({name for step in epoch for name in step}) == 12
    assert prompts != experts
    assert prompts[:3] != prompts[3:]
    again = load(jsonl(tmp_path, sums(12)), tokenizer)
    assert [ids(again.take_experts(4)) for _ in range(6)] == experts
    assert [ids(again.take(4)) for _ in range(6)] == prompts
    other = load(jsonl(tmp_path, sums(12), seed=1), tokenizer)
    assert [ids(other.take(4)) for _ in range(6)] != prompts


def test_experts_only_hold_demonstrations(tmp_path: Path, tokenizer: Any) -> None:
    data = load(jsonl(tmp_path, sums(12, every=3)), tokenizer)
    assert (data.num_prompts, data.num_experts) == (12, 4)
    assert all(prompt.demonstrations for prompt in data.take_experts(4))
    assert sum(bool(prompt.demonstrations) for prompt in data.take(12)) == 4
    with pytest.raises(DataError, match=r"5 different prompts with a demonstration.* has 4"):
        data.take_experts(5)


def test_no_demonstrations_at_all(tmp_path: Path, tokenizer: Any) -> None:
    data = load(jsonl(tmp_path, [{"prompt": "2+2?"}]), tokenizer)
    assert data.take_experts(0) == []
    with pytest.raises(DataError, match=r"has 0: add demonstrations \(data\.columns"):
        data.take_experts(1)


def test_a_step_larger_than_the_set(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"lower loop\.prompts_per_step or add data"):
        load(jsonl(tmp_path, sums(3)), tokenizer).take(4)


def test_held_out_problems_are_never_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*sums(30), *[{"prompt": f" {i}  +\u00a01 = "} for i in range(30)], *sums(5)]
    data = load(jsonl(tmp_path, rows), tokenizer, num_eval=10)
    texts = {"".join(p.messages[-1]["content"].split()) for p in data.eval_prompts}
    trained = {"".join(p.messages[-1]["content"].split()) for p in data.take(data.num_prompts)}
    assert len(texts) == len(data.eval_prompts) == 10
    assert not texts & trained
    report = data.report
    assert report.rows == 65 == report.kept + report.held_out + sum(report.dropped.values())
    assert report.dropped == {"equal to a held-out prompt": 65 - 10 - report.kept}
    other = load(jsonl(tmp_path, rows, seed=1), tokenizer, num_eval=10)
    assert set(ids(other.eval_prompts)) != set(ids(data.eval_prompts))


def test_more_held_out_than_problems(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"3 different problems cannot give 3.*eval\.num_prompts"):
        load(jsonl(tmp_path, sums(3)), tokenizer, num_eval=3)


def test_every_row_is_accounted_for(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        *sums(10),
        {"prompt": "long " * 100, "id": "long"},
        {"prompt": "x" * 10_000_000, "id": "huge"},
        {"prompt": "a<|im_end|>b", "id": "evil"},
        {"prompt": "ok", "demonstration": ["fine", "no<|im_end|>", "long " * 100], "id": "some"},
    ]
    data = load(jsonl(tmp_path, rows), tokenizer)
    report = data.report
    assert (report.rows, report.kept, report.held_out) == (14, 11, 0)
    assert report.dropped == {
        "prompt longer than rollouts.max_prompt_length": 2,
        "control token in the prompt": 1,
    }
    assert report.first_dropped["control token in the prompt"] == [
        "evil (holds the control token '<|im_end|>')"
    ]
    assert [text.split(" ")[0] for text in report.first_dropped[
        "prompt longer than rollouts.max_prompt_length"
    ]] == ["long", "huge"]  # fmt: skip
    assert (report.long_demonstrations, report.refused_demonstrations) == (1, 1)
    assert "14 rows: 11 to train on (11 with a demonstration), 0 held out, 3 dropped" in str(report)
    some = next(p for p in data.take(11) if p.prompt_id == "some")
    assert [d.text for d in some.demonstrations] == ["fine", "long " * 100]
    assert len(some.demonstrations[1].token_ids) > 32


def test_nothing_left(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(
        DataError, match=r"no training prompt is left:\n3 rows.*\n  3 prompt longer"
    ):
        load(jsonl(tmp_path, sums(3)), tokenizer, max_prompt_length=3)


def test_resume(tmp_path: Path, tokenizer: Any) -> None:
    config = jsonl(tmp_path, sums(50, every=2))
    data = load(config, tokenizer, num_eval=5)
    for _ in range(7):
        data.take(4)
        data.take_experts(3)
    state = json.loads(json.dumps(data.state_dict()))
    expected = [ids(data.take(4)) + ids(data.take_experts(3)) for _ in range(20)]
    resumed = load(config, tokenizer, num_eval=5)
    resumed.load_state_dict(state)
    assert [ids(resumed.take(4)) + ids(resumed.take_experts(3)) for _ in range(20)] == expected


@pytest.mark.parametrize(
    ("rows", "config", "named"),
    [
        (sums(49), {}, "training prompts (checkpoint: 50 rows, sha256"),
        ([*sums(49), {"prompt": "49 + 1 =", "answer": "51"}], {}, "training prompts"),
        (sums(50), {"seed": 1}, "data.seed (checkpoint: 0, now: 1)"),
        (sums(50), {"system_prompt": "x"}, "training prompts"),
        (sums(50, every=2), {}, "prompts with a demonstration (checkpoint: 50, now: 25)"),
    ],
)
def test_resume_refuses_other_data(
    tmp_path: Path, tokenizer: Any, rows: Rows, config: dict[str, Any], named: str
) -> None:
    state = load(jsonl(tmp_path, sums(50)), tokenizer).state_dict()
    changed = load(jsonl(tmp_path, rows, **config), tokenizer)
    with pytest.raises(DataError) as caught:
        changed.load_state_dict(state)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "broken", [{}, {"prompts": -1}, {"prompts": "3"}, {"experts": True}, {"fingerprint": None}]
)
def test_resume_refuses_what_is_no_state(
    tmp_path: Path, tokenizer: Any, broken: dict[str, Any]
) -> None:
    data = load(jsonl(tmp_path, sums(5)), tokenizer)
    with pytest.raises(DataError, match="not a state of this data source"):
        data.load_state_dict((data.state_dict() | broken) if broken else {})


def test_records_can_be_read_once_and_passed_on(tmp_path: Path, tokenizer: Any) -> None:
    config = jsonl(tmp_path, sums(20))
    records = read_records(config, 4)
    data = load_data(
        config, tokenizer, num_eval=4, max_prompt_length=64, max_response_length=8, records=records
    )
    assert ids(data.eval_prompts) == [record.prompt_id for record in records.held_out]


def test_another_tokenizer_keeps_the_order(tmp_path: Path, tokenizer: Any) -> None:
    """The order depends on rows kept, not on how they are tokenized."""
    config = ReasoningGymData(type="reasoning_gym", dataset="chain_sum", size=50)
    first = load(config, tokenizer, max_prompt_length=300)
    second = load(config, tokenizer, max_prompt_length=301)
    assert ids(first.take(20)) == ids(second.take(20))


def test_columns_travel_with_their_demonstration(tmp_path: Path, tokenizer: Any) -> None:
    row = {
        "prompt": "2+2?",
        "demonstration": ["4", "5<|im_end|>", "4"],
        "demonstration_score": [1, 0, 0.5],
    }
    lists = [[0.5, 1.0], None, [1.0, 0.0]]
    (prompt,) = load(jsonl(tmp_path, [row | {"token_weights": lists}]), tokenizer).take(1)
    first, third = prompt.demonstrations  # the second holds a control token
    assert first.columns == {"token_weights": (0.5, 1.0)}
    assert third.columns == {"token_weights": (1.0, 0.0)}
    assert [d.score and d.score.reward for d in prompt.demonstrations] == [1.0, 0.5]


def test_a_column_of_another_length_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": f"{i}+2?", "demonstration": "4", "ref_logprobs": [-1.0] * (2 - i)}
        for i in range(2)
    ]
    with pytest.raises(DataError) as caught:
        load(jsonl(tmp_path, rows), tokenizer)
    text = str(caught.value)
    assert (
        "rows.jsonl/2: ref_logprobs of demonstration 0 has 1 numbers, the demonstration 2 tokens"
        in text
    )
    assert "encode_response" in text
    assert "rows.jsonl/1" not in text


def test_rejected_responses_end_like_samples(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": "2+2?", "demonstration": "4", "rejected": ["5", "<|im_end|>", "long " * 100]}
    data = load(jsonl(tmp_path, [row, {"prompt": "1+1?", "rejected": "3"}]), tokenizer)
    prompt = next(p for p in data.take(2) if p.demonstrations)
    assert [r.text for r in prompt.rejected] == ["5", "long " * 100]
    assert prompt.rejected[0].token_ids[-1] == prompt.demonstrations[0].token_ids[-1]
    assert (data.report.with_pair, data.report.refused_rejected) == (1, 1)
    assert "1 rejected responses hold a control token" in str(data.report)
    lengths = [min(len(r.token_ids), 20) for r in (*prompt.demonstrations, *prompt.rejected)]
    assert data.pair_tokens(20) == {prompt.prompt_id: sum(lengths) + 3 * len(prompt.token_ids)}


def test_other_rejected_responses_are_other_data(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"{i}+2?", "demonstration": "4", "rejected": "5"} for i in range(3)]
    state = load(jsonl(tmp_path, rows), tokenizer).state_dict()
    rows[1]["rejected"] = "6"
    with pytest.raises(DataError, match="the data set differs"):
        load(jsonl(tmp_path, rows), tokenizer).load_state_dict(state)
