"""Reward `json_schema`: strict JSON, schemas that can be followed, and equality with an answer."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from plait.engine.types import Score, ScoreStatus
from plait.rewards.answers import last_block
from plait.rewards.json_schema import MAX_DEPTH, grade_json_schema

from .conftest import MakeScorer, make_prompt, score_texts

OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}


def grade(schema: object, completion: str, answer: str | None = None) -> Score:
    return grade_json_schema(make_prompt(answer=answer, metadata={"schema": schema}), completion)


@pytest.mark.parametrize(
    ("completion", "reward", "answer"),
    [
        ('{"a": 1}', 1, '{"a":1}'),
        (' \n{"a": 1.0} ', 1, '{"a":1}'),
        ('so\n```json\n{"a":2}\n```\nthat is it', 1, '{"a":2}'),
        ('```json\n{"a":"x"}\n```\n```json\n{"a":3}\n```', 1, '{"a":3}'),
        ('```json\n{"a":3}\n```\n```json\n{"a":', 1, '{"a":3}'),
        ('```JSON\n{"a":3}\n```', 1, '{"a":3}'),
        ('```json\n{"a":"x"}\n```', 0, '{"a":"x"}'),
        ('so {"a": 1}', 0, ""),
        ('{"a": NaN}', 0, ""),
        ('{"a": Infinity}', 0, ""),
        ('{"a": 1e999}', 0, ""),
        ('{"a": 1, "a": 1}', 0, ""),
        ('{"a": 1,}', 0, ""),
        ("{'a': 1}", 0, ""),
        ('{"a": ' + "9" * 5000 + "}", 0, ""),
        ("[" * 100_000, 0, ""),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), 0, ""),
        ('{"\ud800": 1}', 0, '{"\\ud800":1}'),
        ("", 0, ""),
    ],
)
def test_verdicts(completion: str, reward: float, answer: str) -> None:
    score = grade(OBJECT, completion)
    assert (score.reward, score.answer, score.parts) == (reward, answer, {})


@pytest.mark.parametrize(
    ("gold", "completion", "reward", "valid"),
    [
        ('{"b": [1, 2], "a": 1}', '{"a": 1.0, "b": [1, 2]}', 1, 1),
        ('{"a": 1}', '{"a": true}', 0, 1),
        ("[1, 2]", "[2, 1]", 0, 1),
        ("null", "null", 1, 1),
        ('"é"', '"\\u00e9"', 1, 1),
        ("1", "no", 0, 0),
    ],
)
def test_equal_json(gold: str, completion: str, reward: float, valid: float) -> None:
    score = grade(True, completion, gold)
    assert (score.reward, score.parts) == (reward, {"valid": valid})


def test_an_equal_answer_outside_the_schema_is_wrong() -> None:
    assert grade(False, "1", "1") == Score.ok(0.0, {"valid": 0.0}, "1")


@pytest.mark.parametrize(
    ("schema", "answer", "reason"),
    [
        (None, None, 'no metadata["schema"]'),
        ("string", None, 'no metadata["schema"]'),
        ({"type": "nope"}, None, "no valid schema"),
        ({"pattern": "("}, None, "no valid schema"),
        ({"$ref": "#"}, None, "refers to itself"),
        ({"$ref": "#/nope"}, None, "not inside it"),
        ({"$ref": "file:///etc/hostname"}, None, "not inside it: file:///etc/hostname"),
        (True, "{", "the prompt's answer is no JSON"),
    ],
)
def test_unknown(schema: object, answer: str | None, reason: str) -> None:
    score = grade(schema, "1", answer)
    assert score.status is ScoreStatus.UNKNOWN
    assert reason in score.reason


def test_references_inside_and_drafts() -> None:
    tree = {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"$ref": "#"}}]}
    assert grade(tree, "[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH).reward == 1
    assert grade(tree, '[[["x"]]]').reward == 0
    draft4 = {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "maximum": 3,
        "exclusiveMaximum": True,
    }
    assert grade(draft4, "3").reward == 0
    meta = {"$ref": "https://json-schema.org/draft/2020-12/schema"}
    assert [grade(meta, text).reward for text in ('{"type": "object"}', '{"type": "x"}')] == [1, 0]


def test_a_remote_reference_is_never_fetched() -> None:
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/schema"
        score = grade({"$ref": url}, "1")
        grade({"$schema": url, "type": "integer"}, "1")
        server.shutdown()
    assert "not inside it" in score.reason
    assert asked == []


@pytest.mark.parametrize("piece", ["```json\n", "[1,", '"\\"', "{", "```json\n1\n```\n"])
def test_long_texts_take_no_time(piece: str) -> None:
    started = time.process_time()
    assert grade(True, piece * 100_000).reward is not None
    assert time.process_time() - started < 3.0


def test_last_block() -> None:
    assert last_block("```json\n1\n```\n```py\n2\n```", {"json"}) == "1"
    assert last_block("```py\nopen\n```py\n2\n```", {"py"}) == "2"
    assert last_block("```py\nopen", {"py"}) is None
    assert last_block("- list\n  ```py\n  a:\n    b\n  ```", {"py"}) == "a:\n  b"
    assert last_block("`py` ```py x``` ", {"py"}) is None
    assert last_block("```py\n```", {"py"}) == ""


def test_through_the_scorer(make_scorer: MakeScorer) -> None:
    prompt = make_prompt(answer=None, metadata={"schema": OBJECT})
    scores = score_texts(make_scorer("json_schema"), ['{"a": 1}', '{"a": "1"}', ""], prompt)
    assert [score.reward for score in scores] == [1.0, 0.0, 0.0]
