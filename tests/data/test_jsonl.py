"""JSONL files: every kind of bad row is named with its line; good rows arrive unchanged."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plait.engine.errors import ConfigError, DataError
from plait.rollouts.config import Columns, JsonlData
from plait.rollouts.readers import read_records
from plait.rollouts.records import Record


def write(folder: Path, *lines: str | bytes | dict[str, Any]) -> str:
    encoded = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(x.encode() if isinstance(x, str) else x for x in encoded) + b"\n")
    return str(path)


def read(folder: Path, *lines: str | bytes | dict[str, Any], **config: Any) -> list[Record]:
    path = write(folder, *lines)
    return list(read_records(JsonlData(type="jsonl", path=path, **config)).train)


GOOD = {"prompt": "2+2?"}
SHOWN = {**GOOD, "demonstration": "4"}

BAD_ROWS = {
    "broken": ('{"prompt": "2+2?"', "broken JSON: Expecting ',' delimiter (column 18)"),
    "trailing": ('{"prompt": "a"} x', "broken JSON: Extra data"),
    "nan": ('{"prompt": "a", "answer": NaN}', "NaN is not a JSON value"),
    "long integer": ('{"prompt": "a", "answer": ' + "9" * 5000 + "}", "broken JSON"),
    "deep": ("[" * 200_000, "nested too deeply"),
    "not UTF-8": (b'{"prompt": "\xff\xfe"}', "not UTF-8 (byte 12 of the line)"),
    "list": ("[1, 2]", "a row must be an object, not a list"),
    "null": ("null", "a row must be an object, not null"),
    "no prompt": ({"question": "2+2?"}, "no column 'prompt' or 'messages'"),
    "null prompt": ({"prompt": None}, "'prompt' must be a text, not null"),
    "number prompt": ({"prompt": 7}, "'prompt' must be a text, not a number"),
    "empty prompt": ({"prompt": " \n"}, "'prompt' is empty"),
    "answer": ({**GOOD, "answer": ["4"]}, "'answer' must be a text, not a list"),
    "truth answer": ({**GOOD, "answer": True}, "'answer' must be a text, not a truth value"),
    "demonstration": ({**GOOD, "demonstration": ["a", 3]}, "'demonstration' must be a text"),
    "rejected": ({**SHOWN, "rejected": ["5", 3]}, "'rejected' must be a text, not a number"),
    "empty demonstration": ({**GOOD, "demonstration": ""}, "'demonstration' is empty"),
    "reward": ({**GOOD, "reward": 1.0}, "'reward' must be a text"),
    "column": ({**SHOWN, "token_weights": "1 1"}, "'token_weights' must be a list of numbers"),
    "column entry": ({**SHOWN, "base_logprobs": [-1, "x"]}, "'base_logprobs' must hold numbers"),
    "column null": ({**SHOWN, "base_logprobs": [-1, None]}, "'base_logprobs' must hold numbers"),
    "infinite column": (
        '{"prompt": "a", "demonstration": "b", "ref_logprobs": [1e999]}',
        "holds inf",
    ),
    "columns": (
        {**SHOWN, "base_logprobs": [[-1], [-2]]},
        "2 lists of numbers for 1 demonstrations",
    ),
    "no text": ({**GOOD, "base_logprobs": [-1]}, "1 lists of numbers for 0 demonstrations"),
    "score": ({**SHOWN, "demonstration_score": [1, 0]}, "2 numbers for 1 demonstrations"),
    "truth score": ({**SHOWN, "demonstration_score": True}, "must hold numbers"),
    "metadata": ({**GOOD, "metadata": "x"}, "'metadata' must be an object"),
    "id": ({**GOOD, "id": 1.5}, "'id' must be a text or an integer"),
    "empty id": ({**GOOD, "id": ""}, "'id' is empty"),
    "surrogate": ('{"prompt": "a\\ud800b"}', "lone surrogate U+D800"),
    "surrogate in metadata": (
        '{"prompt": "a", "metadata": {"x": ["\\udfff"]}}',
        "lone surrogate U+DFFF",
    ),
    "messages": ({"messages": []}, "'messages' must be a list of {role, content}"),
    "message": ({"messages": ["hi"]}, "messages[0] must be an object"),
    "role": ({"messages": [{"role": "human", "content": "a"}]}, "messages[0].role = 'human'"),
    "content": ({"messages": [{"role": "user"}]}, "'messages[0].content' must be a text"),
    "tool call": (
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"function": {}}]}]},
        "messages[0].tool_calls is not shown to the model: write the call into the content",
    ),
    "no user": ({"messages": [{"role": "assistant", "content": "a"}]}, "no user message"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    row, message = BAD_ROWS[name]
    with pytest.raises(DataError) as caught:
        read(tmp_path, GOOD, row, GOOD)
    assert "rows.jsonl: 1 bad row\n" in str(caught.value)
    assert "line 2: " in str(caught.value)
    assert message in str(caught.value)


def test_all_bad_rows_at_once_up_to_twenty(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, *[{"prompt": ""}] * 33)
    lines = str(caught.value).splitlines()
    assert "33 bad rows" in lines[0]
    assert [f"line {i}" in line for i, line in enumerate(lines[1:-1], start=1)] == [True] * 20
    assert "13 more" in lines[-1]


def test_duplicate_ids_name_both_lines(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 3: duplicate id 'a', first used by line 1"):
        read(tmp_path, {**GOOD, "id": "a"}, {**GOOD, "id": "b"}, {**GOOD, "id": "a"})


def test_a_given_id_may_not_equal_a_made_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"duplicate id 'rows\.jsonl/1'"):
        read(tmp_path, GOOD, {**GOOD, "id": "rows.jsonl/1"})


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_empty_data_set(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="empty"):
        read_records(JsonlData(type="jsonl", path=str(path)))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path = .*no such file"):
        read_records(JsonlData(type="jsonl", path=str(tmp_path / "none.jsonl")))


def test_columns_and_defaults(tmp_path: Path) -> None:
    columns = Columns(prompt="q", answer="a", demonstration="d", reward="r", metadata="m", id="n")
    row = {"q": "2+2?", "a": 4, "d": ["4", "four"], "r": "exact", "m": {"x": [1]}, "n": 7}
    (record,) = read(tmp_path, row, columns=columns)
    assert record == Record(
        "7", ({"role": "user", "content": "2+2?"},), "4", ("4", "four"), "exact", {"x": [1]},
        origin="rows.jsonl",
    )  # fmt: skip
    first, second = read(tmp_path, "", GOOD, b"\r", GOOD)
    assert first == Record(
        "rows.jsonl/2", ({"role": "user", "content": "2+2?"},), origin="rows.jsonl"
    )
    assert second.prompt_id == "rows.jsonl/4"


def test_byte_order_mark(tmp_path: Path) -> None:
    assert len(read(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode())) == 1


def test_a_column_that_no_row_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, GOOD, columns=Columns(answer="solution"))
    assert "data.columns.answer = 'solution': no row of rows.jsonl has it" in str(caught.value)
    assert "columns: prompt" in str(caught.value)


def test_max_rows_reads_no_further(tmp_path: Path) -> None:
    assert len(read(tmp_path, GOOD, GOOD, "broken", max_rows=2)) == 2


def test_conversation_that_ends_with_the_reply(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    (record,) = read(tmp_path, {"messages": turns})
    assert record.messages == ({"role": "user", "content": "2+2?"},)
    assert record.demonstrations == ("4",)
    with pytest.raises(DataError, match="keep one of them"):
        read(tmp_path, {"messages": turns, "demonstration": "4"})


TURNS = [
    {"role": "system", "content": "Use the tool."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "add(2, 2)", "tool_calls": None},
    {"role": "tool", "content": "4", "name": "add"},
]


def test_conversations_of_several_turns(tmp_path: Path) -> None:
    """The prompt is all but the last reply; templates go around the last user message."""
    shown = [{"role": m["role"], "content": m["content"]} for m in TURNS]
    (record,) = read(tmp_path, {"messages": TURNS}, prompt_template="Q: {prompt}")
    assert record.messages == (shown[0], {"role": "user", "content": "Q: 2+2?"}, *shown[2:])
    assert record.demonstrations == ()
    reply = {"role": "assistant", "content": "It is 4."}
    more = {"role": "user", "content": "And 3+3?"}
    first, second, third = read(
        tmp_path,
        {"messages": [*TURNS, reply]},
        {"messages": [*TURNS, reply, more]},
        {"messages": [*TURNS, reply, more], "demonstration": ["6", "six"]},
        prompt_template="Q: {prompt}",
        demonstration_template="A: {demonstration}",
    )
    assert first.messages == record.messages
    assert first.demonstrations == ("A: It is 4.",)
    assert [m["content"] for m in second.messages[1:]] == [
        "2+2?", "add(2, 2)", "4", "It is 4.", "Q: And 3+3?",
    ]  # fmt: skip
    assert second.demonstrations == ()
    assert third.demonstrations == ("A: 6", "A: six")


def test_templates(tmp_path: Path) -> None:
    row = {"prompt": "1{answer}?", "answer": "2", "demonstration": r"so {answer} \boxed{x}"}
    (record,) = read(
        tmp_path,
        row,
        system_prompt="Be brief.",
        prompt_template="{prompt}\nUse {braces}.",
        demonstration_template=r"{demonstration} \boxed{{answer}}",
    )
    assert [m["content"] for m in record.messages] == ["Be brief.", "1{answer}?\nUse {braces}."]
    assert record.demonstrations == (r"so {answer} \boxed{x} \boxed{2}",)
    with pytest.raises(DataError, match=r"uses \{answer\}, but the row has none"):
        read(tmp_path, {**GOOD, "demonstration": "x"}, demonstration_template="{answer}")


def test_a_row_may_bring_its_own_system_prompt(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "A"}, {"role": "user", "content": "b"}]
    (record,) = read(tmp_path, {"messages": turns}, system_prompt="B", prompt_template="<{prompt}>")
    assert [m["content"] for m in record.messages] == ["A", "<b>"]


def test_template_without_a_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, GOOD, prompt_template="x", demonstration_template="y")
    assert "data.prompt_template = 'x': must contain {prompt}" in str(caught.value)
    assert "data.demonstration_template = 'y'" in str(caught.value)


def test_fast_without_anything_heavy(tmp_path: Path) -> None:
    path = write(tmp_path, *[GOOD] * 20_000, {"prompt": ""})
    code = (
        "import sys, time\n"
        "from plait.engine.errors import DataError\n"
        "from plait.rollouts.config import JsonlData\n"
        "from plait.rollouts.readers import read_records\n"
        "start = time.process_time()\n"
        "try:\n"
        f"    read_records(JsonlData(type='jsonl', path={path!r}), 10)\n"
        "except DataError as error:\n"
        "    assert 'line 20001' in str(error)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'reasoning_gym', 'ray'} & set(sys.modules)\n"
        "print(time.process_time() - start, sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = done.stdout.split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert float(seconds) < 2


def test_ten_megabyte_row_is_read(tmp_path: Path) -> None:
    (record,) = read(tmp_path, {"prompt": "word " * 2_000_000})
    assert len(record.messages[0]["content"]) == 10_000_000


def test_columns_of_demonstrations(tmp_path):
    one = {**SHOWN, "token_weights": [1, 0.5], "demonstration_score": 1}
    two = {"prompt": "1+1?", "demonstration": ["2", "3"], "base_logprobs": [[-1, -2], None]}
    two["demonstration_score"] = [1.0, None]
    first, second = read(tmp_path, one, two)
    assert (first.columns, first.scores) == ({"token_weights": ((1.0, 0.5),)}, (1.0,))
    assert second.columns == {"base_logprobs": ((-1.0, -2.0), None)}
    assert second.scores == (1.0, None)
    named = Columns(history_logprobs="past")
    (row,) = read(tmp_path, {**SHOWN, "past": [-1, -2]}, columns=named)
    assert row.columns == {"history_logprobs": ((-1.0, -2.0),)}


def test_rejected_responses_are_taken_as_they_are(tmp_path):
    row = {"prompt": "2+2?", "answer": "4", "demonstration": "4", "rejected": ["5", "{answer}"]}
    one = {"prompt": "1+1?", "answer": "2", "demonstration": "2", "rejected": "3"}
    template = "so {demonstration} #### {answer}"
    records = read(tmp_path, row, one, demonstration_template=template)
    assert [record.rejected for record in records] == [("5", "{answer}"), ("3",)]
    assert records[0].demonstrations == ("so 4 #### 4",)
