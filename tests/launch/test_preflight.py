"""Each line of the preflight refuses what it is there for; all of it on a real cluster: tests/faults/test_jobs.py."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.exceptions

from end_to_end.command_line import tiny_recipe
from plait.engine.errors import ClusterError, ConfigError
from plait.launch import preflight
from plait.launch.config import Recipe, validate
from plait.launch.run import check_inputs

VERSIONS = {"plait": "1", "torch": "2"}


@pytest.fixture
def recipe(tmp_path, tiny_model, monkeypatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} + {i}?", "answer": str(2 * i)} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make(tiny_model, tmp_path)


def make(model: Path, folder: Path, **sections) -> Recipe:
    raw = tiny_recipe(model, algorithm={"type": "grpo"}, **sections)
    raw["algorithm"] = {"type": "grpo", "rollouts_per_prompt": 2}
    return validate({**raw, "run": {"name": "checked", "dir": str(folder / "runs")}})


class Probe:
    """A node that answers what a test wants, in the place of an actor."""

    def __init__(self, report: preflight.NodeReport, cut: tuple[str, ...] = ()) -> None:
        self.answer, self.cut = report, cut
        self.writes = True

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: self.call(name, *args))

    def call(self, name: str, *args: Any) -> Any:
        if name == "report":
            folder, word, _ = args
            if self.writes:
                (Path(folder) / f"{word}-{id(self)}").write_text(word)
            return self.answer
        return 1234 if name == "port" else list(self.cut)


def table(recipe: Recipe, *probes: Probe, monkeypatch) -> dict[str, preflight.Check]:
    monkeypatch.setattr(ray, "get", lambda call, timeout: call)
    recipe.folder.mkdir(parents=True, exist_ok=True)
    addresses = [probe.answer.address for probe in probes]
    word = f".preflight-{time.monotonic_ns()}"
    checks = preflight.judge(recipe, addresses, probes, recipe.folder, word)
    return {check.name: check for check in checks}


def node(address: str, **values: Any) -> preflight.NodeReport:
    return replace(preflight.NodeReport(address, VERSIONS), **values)


def test_equal_nodes_pass(recipe, monkeypatch):
    checks = table(recipe, Probe(node("a")), Probe(node("b")), monkeypatch=monkeypatch)
    assert not any(check.problem for check in checks.values())
    assert str(checks["versions"]).startswith("versions   ok   2 nodes: plait 1, torch 2")


@pytest.mark.parametrize(
    ("line", "values", "said"),
    [
        ("versions", {"versions": {"plait": "1", "torch": "3"}}, "node b: torch 3, not 2"),
        ("versions", {"versions": {"plait": "1"}}, "node b: torch absent, not 2"),
        (
            "imports",
            {"failed_imports": {"vllm": "ImportError: no"}},
            "node b: vllm: ImportError: no",
        ),
        (
            "folder",
            {"folder_problem": "Permission denied"},
            "node b: Permission denied; run.dir must",
        ),
        ("model", {"model_problem": "no such folder"}, "node b: no such folder"),
    ],
)
def test_a_node_that_differs_is_named(recipe, monkeypatch, line, values, said):
    checks = table(recipe, Probe(node("a")), Probe(node("b", **values)), monkeypatch=monkeypatch)
    assert said in checks[line].problem
    assert "REFUSED" in str(checks[line])
    assert [name for name, check in checks.items() if check.problem] == [line]


def test_a_folder_of_the_same_name_on_another_disk(recipe, monkeypatch):
    """What the node wrote is not seen here."""
    elsewhere = Probe(node("b"))
    elsewhere.writes = False
    checks = table(recipe, Probe(node("a")), elsewhere, monkeypatch=monkeypatch)
    assert "1 of 2 nodes write elsewhere" in checks["folder"].problem


def test_a_node_behind_a_firewall(recipe, monkeypatch):
    checks = table(recipe, Probe(node("a"), cut=("b (timed out)",)), monkeypatch=monkeypatch)
    assert checks["ports"].problem == "node a: cannot connect to b (timed out)"


def test_a_node_that_gives_no_answer_is_named(monkeypatch):
    def get(call: str, timeout: float) -> str:
        if call == "never":
            raise ray.exceptions.GetTimeoutError("Get timed out")
        return call

    monkeypatch.setattr(ray, "get", get)
    assert preflight.answers(["a", "b"], ["x", "y"]) == ["x", "y"]
    with pytest.raises(ClusterError, match="node b did not finish the preflight within 180 s: Get"):
        preflight.answers(["a", "b"], ["x", "never"])


def test_a_real_probe(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(preflight, "IMPORTS", ("json", "no_such_module"))
    probe = preflight.NodeProbe("127.0.0.1")
    (tmp_path / "word").write_text("word")
    report = probe.report(str(tmp_path), "word", str(tiny_model))
    assert report.versions["python"].startswith("3.")
    assert list(report.failed_imports) == ["no_such_module"]
    assert report.folder_problem == report.model_problem == ""
    assert len(list(tmp_path.glob("word-*"))) == 1
    bad = probe.report(str(tmp_path / "none"), "word", "/no/model")
    assert "No such file" in bad.folder_problem
    assert "no such folder" in bad.model_problem
    assert probe.unreachable([("127.0.0.1", probe.port())]) == []
    probe.listener.close()


def test_gpus_must_fit_piece_by_piece(recipe, monkeypatch, tiny_model, tmp_path):
    def nodes(*gpus: int) -> None:
        found = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": float(n)}} for n in gpus]
        monkeypatch.setattr(ray, "nodes", lambda: found)

    wanted = make(
        tiny_model,
        tmp_path,
        rollouts={"device": "cuda", "weight_sync": "nccl", "tensor_parallel_size": 4},
        learner={"device": "cuda", "num_workers": 2},
    )
    nodes(4, 2)
    assert not preflight.check_supply(wanted).problem
    nodes(2, 2, 2)
    assert "needs GPU 6 (2 x GPU 1, 1 x GPU 4)" in preflight.check_supply(wanted).problem
    nodes(5)
    assert preflight.check_supply(wanted).problem
    assert not preflight.check_supply(recipe).problem, "a CPU recipe needs no GPU"
    nodes(0)
    placed = preflight.check_supply(make(tiny_model, tmp_path, learner={"resources": {"here": 1}}))
    assert "the recipe needs here 1" in placed.problem
    assert placed.found == "the nodes have: no GPU"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("return float(completion.strip() == prompt.answer)", ""),
        (
            "import time; time.sleep(0.7); return float(completion == prompt.answer)",
            "more than half",
        ),
        ("return 1.0", "fails the gold test"),
    ],
)
def test_a_reward_that_is_slow_or_untrue_is_refused(recipe, tmp_path, tiny_model, code, said):
    name = f"checked_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(f"def grade(prompt, completion):\n    {code}\n")
    reward = {"function": f"{name}:grade", "timeout_seconds": 1.0, "gold_samples": 2}
    inputs = check_inputs(make(tiny_model, tmp_path, reward=reward))
    check = preflight.check_reward(inputs)
    assert said in check.problem
    assert bool(check.problem) == bool(said)


def test_a_reward_that_cannot_be_imported(recipe, tiny_model, tmp_path):
    with pytest.raises(ConfigError, match=r"reward\.function"):
        preflight.preflight(make(tiny_model, tmp_path, reward="nowhere:grade"))
