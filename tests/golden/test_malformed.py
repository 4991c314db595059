"""A golden case of any shape gives one line: null keys are no keys, and what is unknown or misshapen fails."""

import json

import pytest
from typer.testing import CliRunner

from golden_cases import CASES, case_of
from plait.launch.cli import app
from plait.launch.golden import check_case

DEFAULT = "grpo/loss/default"


def changed(name, path, value):
    """A copy of the case with the value at a path of keys and indices replaced."""
    case = case_of(name)
    place = case
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return case


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (DEFAULT, ["config"]),
        (DEFAULT, ["coefs"]),
        (DEFAULT, ["variant"]),
        (DEFAULT, ["update"]),
        (DEFAULT, ["step"]),
        (DEFAULT, ["tolerance"]),
        (DEFAULT, ["micro_batches"]),
        (DEFAULT, ["expect", "advantages"]),
        (DEFAULT, ["rows", 0, "prefix_len"]),
        (DEFAULT, ["rows", 0, "token_weights"]),
        ("sft/loss/default", ["rows", 0, "prefix_len"]),
    ],
)
def test_a_null_key_is_no_key(name, path):
    result = check_case(changed(name, path, None))
    assert result.ok, result.problem
    assert str(result).endswith(" ok")


@pytest.mark.parametrize(
    ("name", "path", "value", "words"),
    [
        (DEFAULT, ["algorithm"], None, "algorithm"),
        (DEFAULT, ["name"], None, "name"),
        (DEFAULT, ["kind"], [], "kind"),
        (DEFAULT, ["expect"], {}, "expect"),
        (DEFAULT, ["surprise"], 1, "surprise"),
        (DEFAULT, ["step"], "soon", "step"),
        (DEFAULT, ["tolerance"], 0, "loss"),
        (DEFAULT, ["config"], "grpo", "config"),
        (DEFAULT, ["coefs"], {"mu": 0.5}, "no coefficient 'mu'"),
        ("chord/loss/phi", ["coefs"], {"nu": 0.5}, "no coefficient 'nu'"),
        ("ppo/loss/critic", ["coefs"], {"nu": 0.5}, "no coefficient 'nu'"),
        (DEFAULT, ["rows"], None, "rows"),
        (DEFAULT, ["rows", 0], None, "rows.0"),
        (DEFAULT, ["rows", 0, "source"], "oracle", "source"),
        (DEFAULT, ["rows", 0, "weights"], [1.0], "weights"),
        (DEFAULT, ["rows", 0, "token_weights"], [1.0], "token_weights has 1 entries"),
        (DEFAULT, ["rows", 0, "logits"], [[0.0, 1.0], [1.0]], "one size"),
        (DEFAULT, ["rows", 0, "logits"], None, "row 0 has no logits"),
        (DEFAULT, ["rows", 0, "response_ids"], [99, 1], "token id 99"),
        (DEFAULT, ["rows", 0, "prefix_len"], 9, "prefix_len = 9"),
        (DEFAULT, ["rows", 0, "reward"], "good", "reward"),
        (DEFAULT, ["micro_batches"], [[0, 1], [99]], "micro_batches"),
        (DEFAULT, ["micro_batches"], [[0, 1]], "micro_batches"),
        ("one_token_rollout/loss/default", ["rows", 0, "samples", 0, 0], 99, "token id 99"),
        ("chord/schedule/decay only", ["steps"], [-1], "steps"),
        ("hpt/trace/gate 0", ["inputs"], None, "inputs"),
        ("hpt/trace/gate 0", ["inputs", 0], {"rewards": [["a"]]}, "ValueError"),
        ("hpt/trace/gate 0", ["inputs", 0], {"rewards": [["a", [None]]]}, "TypeError"),
        ("bread/trace/search", ["inputs", 1, "success_by_pieces"], [0], "IndexError"),
    ],
)
def test_a_malformed_case_fails_by_name(name, path, value, words):
    result = check_case(changed(name, path, value))
    assert not result.ok
    assert words in result.problem


@pytest.mark.parametrize("case", [None, [], "case", {}])
def test_what_is_no_case_fails(case):
    assert not check_case(case).ok


def test_the_rest_of_the_file_is_checked_and_the_exit_code_tells(tmp_path):
    good = CASES[DEFAULT]
    for bad, code in (([], 0), ([None, changed(DEFAULT, ["rows"], None)], 1)):
        file = tmp_path / "cases.json"
        file.write_text(json.dumps({"schema": 1, "cases": [*bad, good]}))
        result = CliRunner().invoke(app, ["check", "golden", str(file)])
        lines = result.stdout.splitlines()
        assert result.exit_code == code
        assert sum(" FAIL " in line for line in lines) == len(bad)
        assert sum(line.endswith(" ok") for line in lines) == 1


def loss_case(algorithm, rows, loss, metrics, **config):
    expect = {"loss": loss, "grad_logits": [[] for _ in rows], "metrics": metrics}
    names = {"name": "x", "kind": "loss", "algorithm": algorithm, "config": config}
    return {**names, "rows": rows, "expect": expect}


@pytest.mark.parametrize("rows", [[], [{"source": "policy", "group": "a", "response_ids": []}]])
@pytest.mark.parametrize("algorithm", ["grpo", "luffy", "chord", "srft", "hpt", "amft", "topr"])
def test_components_without_tokens_are_zero(algorithm, rows):
    metrics = {"entropy": 0.0, "kl": 0.0}
    result = check_case(loss_case(algorithm, rows, 0.0, metrics, entropy_coef=0.1, kl_coef=0.1))
    assert result.ok, result.problem


def test_relift_reports_the_entropy_of_demonstrations_without_a_bonus():
    case = changed("relift/loss/sft", ["config", "expert_entropy_coef"], 0.0)
    loss = case["expect"]["metrics"]["expert_loss"]
    case["expect"] = {"loss": loss, "metrics": case["expect"]["metrics"]}
    result = check_case(case)
    assert result.ok, result.problem


@pytest.mark.parametrize("algorithm", ["uft", "bread", "prefix_rft"])
def test_advantage_rows_may_carry_their_tokens(algorithm):
    """Group mean of rewards 1 and 0; a hybrid row's number is its continuation's."""
    plain = {"source": "policy", "group": "a", "reward": 0.0}
    tokens = {"response_ids": [1, 2, 3], "token_weights": [1.0, 1.0, 1.0], "prefix_len": 2}
    hybrid = {"source": "hybrid", "group": "a", "reward": 1.0, **tokens}
    names = {"name": "x", "kind": "advantage", "algorithm": algorithm}
    case = {**names, "config": {"advantage": "group_mean"}, "rows": [plain, hybrid]}
    result = check_case({**case, "expect": {"advantages": [-0.5, 0.5]}})
    assert result.ok, result.problem
    if algorithm == "prefix_rft":
        case["config"] = {"prefix_advantage": "separate"}
        case["rows"] = [plain, {**plain, "reward": 1.0}, hybrid]
        result = check_case({**case, "expect": {"advantages": [-0.5, 0.5, 1.0]}})
        assert result.ok, result.problem


def test_visurf_takes_an_empty_response_for_a_rollout():
    """A right rollout without tokens smooths the demonstration's reward to the mean of 1 and 0."""
    names = {"name": "x", "kind": "loss", "algorithm": "visurf"}
    empty = {"source": "policy", "group": "a", "reward": 1.0, "response_ids": [], "logits": []}
    one = {"group": "a", "response_ids": [0], "logits": [[0.0, 0.0]], "old_logprobs": [-0.5]}
    rollout = {**one, "source": "policy", "reward": 0.0}
    expert = {**one, "source": "expert", "reward": 1.0, "prefix_len": 1}
    case = {**names, "config": {"advantage": "group_mean"}, "rows": [empty, rollout, expert]}
    result = check_case({**case, "expect": {"advantages": [[], [-0.5], [0.0]]}})
    assert result.ok, result.problem
