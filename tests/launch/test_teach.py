"""Traces are verified, different, and on disk: nothing is asked twice, nothing is lost."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from plait.engine.errors import ConfigError, DataError, RolloutError
from plait.engine.types import Prompt, Rollout, RolloutRequest, Sampling
from plait.launch import teach as module
from plait.launch.collect import read_whole_lines
from plait.launch.config import Recipe, load_recipe
from plait.launch.teach import DEMONSTRATIONS, UNSOLVED, Teaching, teach
from plait.rollouts.endpoint import Endpoint
from plait.rollouts.readers import read_records


class FakeTeacher:
    """Answers `right` prompts at the second try, others only when a hint is shown; every fifth answer is cut."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[tuple[str, int]] = []
        self.fail_at = fail_at

    def wait_started(self, stop_token_ids: Sequence[int] = ()) -> None:
        assert stop_token_ids

    def generate(self, requests: Sequence[RolloutRequest], *, step: int) -> Iterator[Rollout]:
        for request in requests:
            prompt = request.prompt
            for index in range(request.first_index, request.first_index + request.n):
                if self.fail_at is not None and len(self.asked) >= self.fail_at:
                    raise KeyboardInterrupt
                self.asked.append((prompt.prompt_id, index))
                number = int(prompt.answer or "")
                hinted = "may begin like this" in prompt.messages[-1]["content"]
                right = hinted or (number % 3 and index == 1)
                text = prompt.answer if right else "no idea"
                finish = "length" if number % 5 == 0 else "stop"
                yield Rollout(
                    prompt.prompt_id, index, (5, 6), 0, (-0.5, -0.25), 0, finish, text or ""
                )


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"Say {i}", "answer": str(i), "demonstration": f"We say so: {i}"}
        for i in range(1, 80)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tiny_model}\nalgorithm: {{type: grpo}}\ndata: {{type: jsonl, path: rows.jsonl}}\n"
        "reward: exact\nloop: {steps: 1, prompts_per_step: 4}\neval: {num_prompts: 4}\n"
        "rollouts: {max_prompt_length: 200, max_response_length: 40}\n"
    )
    return load_recipe("recipe.yaml")


def use(monkeypatch: pytest.MonkeyPatch, teacher: FakeTeacher) -> FakeTeacher:
    from contextlib import contextmanager

    @contextmanager
    def opened(recipe: Recipe, teaching: Teaching):
        yield teacher, recipe.model.path

    monkeypatch.setattr(module, "open_teacher", opened)
    return teacher


def quiet(_: str) -> None:
    pass


def rows_of(folder: Path) -> tuple[list[dict], list[dict]]:
    return read_whole_lines(folder / DEMONSTRATIONS), read_whole_lines(folder / UNSOLVED)


def test_only_verified_finished_answers_are_kept(recipe, monkeypatch, tmp_path) -> None:
    use(monkeypatch, FakeTeacher())
    totals = teach(recipe, Teaching("t", max_kept=2), tmp_path / "out", quiet)
    solved, unsolved = rows_of(tmp_path / "out")
    assert totals.prompts == 75 == len(solved) + len(unsolved)
    for row in solved:
        number = int(row["answer"])
        assert number % 3
        assert number % 5
        assert row["demonstration"] == [row["answer"]]  # the same text twice is one trace
        assert row["demonstration_score"] == [1.0]
    assert all(
        int(row["id"].split("/")[1]) % 3 == 0 or int(row["id"].split("/")[1]) % 5 == 0
        for row in unsolved
    )


def test_an_endpoint_with_a_password_is_not_written_down(recipe, tmp_path) -> None:
    teaching = Teaching("t", endpoint="https://me:sk-canary-3@host/v1")
    with pytest.raises(ConfigError, match=r"--endpoint: .*api_key_env") as caught:
        teach(recipe, teaching, tmp_path / "out", quiet)
    assert "canary" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_hint_solves_what_was_unsolved(recipe, monkeypatch, tmp_path) -> None:
    teacher = use(monkeypatch, FakeTeacher())
    totals = teach(recipe, Teaching("t", hint_fraction=0.5), tmp_path / "out", quiet)
    solved, unsolved = rows_of(tmp_path / "out")
    assert totals.solved_with_hint == sum(row["hinted"][0] for row in solved) > 0
    assert all(int(row["id"].split("/")[1]) % 5 == 0 for row in unsolved)
    assert all("may begin" not in row["messages"][-1]["content"] for row in solved)
    assert len(teacher.asked) == len(set(teacher.asked))


def test_a_killed_session_repeats_and_loses_nothing(recipe, monkeypatch, tmp_path) -> None:
    whole = use(monkeypatch, FakeTeacher())
    teach(recipe, Teaching("t"), tmp_path / "whole", quiet)
    first = use(monkeypatch, FakeTeacher(fail_at=200))
    with pytest.raises(KeyboardInterrupt):
        teach(recipe, Teaching("t"), tmp_path / "out", quiet)
    with (tmp_path / "out" / DEMONSTRATIONS).open("a") as file:
        file.write('{"id": "torn')
    second = use(monkeypatch, FakeTeacher())
    teach(recipe, Teaching("t"), tmp_path / "out", quiet)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")
    assert 0 < len(second.asked) < len(whole.asked)
    finished = {prompt for prompt, _ in whole.asked} - {prompt for prompt, _ in second.asked}
    assert len(finished) == 32
    assert finished < {prompt for prompt, _ in first.asked}


def test_traces_are_data_that_reads_back(recipe, monkeypatch, tmp_path) -> None:
    use(monkeypatch, FakeTeacher())
    teach(recipe, Teaching("t"), tmp_path / "out", quiet)
    path = tmp_path / "out" / DEMONSTRATIONS
    again = load_recipe("recipe.yaml", [f"data.path={path}", "eval.num_prompts=0"])
    records = read_records(again.data).train
    solved, _ = rows_of(tmp_path / "out")
    assert [r.demonstrations for r in records] == [tuple(row["demonstration"]) for row in solved]
    assert [list(map(dict, r.messages)) for r in records] == [row["messages"] for row in solved]


def test_other_settings_need_another_folder(recipe, monkeypatch, tmp_path) -> None:
    use(monkeypatch, FakeTeacher())
    teach(recipe, Teaching("t", max_prompts=3), tmp_path / "out", quiet)
    teach(recipe, Teaching("t", max_prompts=5), tmp_path / "out", quiet)
    with pytest.raises(ConfigError, match="teaching was"):
        teach(recipe, Teaching("other"), tmp_path / "out", quiet)
    line = (tmp_path / "out" / UNSOLVED).read_text().splitlines()[0]
    with (tmp_path / "out" / UNSOLVED).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="is there twice"):
        teach(recipe, Teaching("t"), tmp_path / "out", quiet)


class FakeServer(BaseHTTPRequestHandler):
    replies: list[tuple[int, dict]]
    seen: list[dict]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append({**body, "key": self.headers["Authorization"]})
        status, reply = type(self).replies.pop(0) if type(self).replies else (200, answer("4"))
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def answer(text: str, finish: str = "stop") -> dict:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


@pytest.fixture
def server() -> Iterator[tuple[str, type[FakeServer]]]:
    handler = type("Handler", (FakeServer,), {"replies": [], "seen": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/v1", handler
    running.shutdown()
    running.server_close()
    thread.join()


def request(n: int = 2, **fields) -> RolloutRequest:
    prompt = Prompt("p", ({"role": "user", "content": "2+2?"},), (1,), answer="4")
    return RolloutRequest(prompt, n, Sampling(max_tokens=7, temperature=0.5), **fields)


def test_an_endpoint_is_asked_once_a_sample(server, monkeypatch) -> None:
    url, handler = server
    monkeypatch.setenv("TEACHER_KEY", "secret-word")
    endpoint = Endpoint(url, "big", api_key_env="TEACHER_KEY", seed=3)
    handler.replies = [(200, answer("4", "length")), (500, {}), (429, {})]
    rollouts = {r.index: r for r in endpoint.generate([request(3, first_index=2)], step=0)}
    assert sorted(rollouts) == [2, 3, 4]
    assert sorted(r.finish_reason for r in rollouts.values()) == ["length", "stop", "stop"]
    assert all(r.text == "4" and not r.token_ids for r in rollouts.values())
    assert len(handler.seen) == 5
    first = handler.seen[0]
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("big", 7, 0.5)
    assert first["key"] == "Bearer secret-word"
    assert len({call["seed"] for call in handler.seen}) == 3  # a retry repeats its sample


def test_nothing_more_is_asked_when_the_reader_stops(server) -> None:
    url, handler = server
    rollouts = Endpoint(url, "big", max_concurrency=1).generate([request(50)], step=0)
    next(rollouts)
    rollouts.close()  # type: ignore[attr-defined]
    time.sleep(0.5)
    asked = len(handler.seen)
    time.sleep(0.5)
    assert len(handler.seen) == asked < 50


def test_an_endpoint_that_refuses_names_the_prompt(server) -> None:
    url, handler = server
    handler.replies = [(400, {"error": {"message": "no such model"}})]
    with pytest.raises(RolloutError, match=r"prompt p: .*'big'.*no such model"):
        list(Endpoint(url, "big").generate([request(1)], step=0))
    with pytest.raises(RolloutError, match="cannot continue a prefix"):
        list(Endpoint(url, "big").generate([request(1, prefix=(4,))], step=0))
    with pytest.raises(ConfigError, match="no such environment variable"):
        Endpoint(url, "big", api_key_env="NO_SUCH_KEY")
