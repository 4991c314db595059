"""Rates of the start model: nothing is asked twice, UNKNOWN is neither right nor wrong, and a run reads the table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
import pytest

from plait.engine.errors import ConfigError, DataError, RunInUse
from plait.engine.evaluation import pass_at_k
from plait.engine.types import Rollout, RolloutRequest
from plait.launch import probe as module
from plait.launch.config import Recipe, load_recipe
from plait.launch.probe import RATES, Probing, probe
from plait.launch.probe_report import ProbeReport, failure_chance, signal_chance
from plait.launch.run import check_inputs, load_prompts
from plait.launch.run_lock import lock_run
from plait.rollouts.probe_table import Rate, read_rates

ROWS, HELD_OUT = 80, 4


class FakeModel:
    """Of prompt i, the first i % 5 of four answers are right."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[tuple[str, int]] = []
        self.fail_at = fail_at

    def wait_started(self, stop_token_ids: Sequence[int] = ()) -> None:
        assert stop_token_ids

    def generate(self, requests: Sequence[RolloutRequest], *, step: int) -> Iterator[Rollout]:
        for request in requests:
            prompt = request.prompt
            for index in range(request.n):
                if self.fail_at is not None and len(self.asked) >= self.fail_at:
                    raise KeyboardInterrupt
                self.asked.append((prompt.prompt_id, index))
                right = index < int(prompt.answer or "") % 5
                text = prompt.answer if right else "no idea"
                yield Rollout(
                    prompt.prompt_id, index, (5, 6), 0, (-0.5, -0.25), 0, "stop", text or ""
                )


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"Say {i}", "answer": str(i), "demonstration": [f"It is {i}"] if i % 2 else []}
        for i in range(ROWS)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tiny_model}\nalgorithm: {{type: hpt, rollouts_per_prompt: 4}}\n"
        "data: {type: jsonl, path: rows.jsonl}\n"
        f"reward: exact\nloop: {{steps: 1, prompts_per_step: 4}}\neval: {{num_prompts: {HELD_OUT}}}\n"
        "rollouts: {max_prompt_length: 200, max_response_length: 40}\n"
    )
    return load_recipe("recipe.yaml")


@contextmanager
def _opened(model: FakeModel, path: str):
    yield model, path


def use(monkeypatch: pytest.MonkeyPatch, model: FakeModel) -> FakeModel:
    monkeypatch.setattr(module, "open_model", lambda recipe, path: _opened(model, path))
    return model


def quiet(_: str) -> None:
    pass


FOUR = Probing(rollouts_per_prompt=4)


def number(prompt_id: str) -> int:
    return int(prompt_id.rpartition("/")[2]) - 1


def test_each_training_prompt_is_classed_by_its_rollouts(recipe, monkeypatch, tmp_path) -> None:
    use(monkeypatch, FakeModel())
    report = probe(recipe, FOUR, tmp_path / "out", quiet)
    rates = read_rates(tmp_path / "out" / RATES)
    assert len(rates) == ROWS - HELD_OUT == len(report.rates)
    for prompt_id, rate in rates.items():
        i = number(prompt_id)
        assert (rate.scored, rate.right, rate.unknown) == (4, i % 5, 0)
        assert rate.has_demonstration == bool(i % 2)
    facts = report.to_json()
    per_right = [sum(r.right == n for r in report.rates) for n in range(5)]
    assert facts["classes"] == {
        "solved": per_right[4],
        "learnable": sum(per_right[1:4]),
        "out_of_reach": per_right[0],
        "unknown": 0,
    }
    for k in (1, 2, 4):
        chance = np.average([pass_at_k(4, n, k) for n in range(5)], weights=per_right)
        assert facts["pass_at"][str(k)] == pytest.approx(chance)
    assert facts["signal_share"] == pytest.approx(sum(per_right[1:4]) / len(rates))
    bare = sum(not r.has_demonstration for r in report.rates if r.right == 0)
    assert facts["traces_worth_buying"] == pytest.approx(bare * failure_chance(4, 4))
    report.show()


def test_an_unknown_score_is_neither_right_nor_wrong(recipe, monkeypatch, tmp_path) -> None:
    (tmp_path / "lies.py").write_text(
        "def grade(prompt, completion):\n"
        "    if int(prompt.answer) % 7 == 0 :\n"
        "        return None\n"
        "    return float(prompt.answer == completion)\n"
    )
    use(monkeypatch, FakeModel())
    judged = load_recipe("recipe.yaml", ["reward={function: 'lies:grade', gold_samples: 0}"])
    report = probe(judged, FOUR, tmp_path / "out", quiet)
    rates = {number(name): r for name, r in read_rates(tmp_path / "out" / RATES).items()}
    for i, rate in rates.items():
        if i % 7 == 0:
            assert (rate.scored, rate.right, rate.unknown, rate.reach) == (0, 0, 4, "unknown")
    facts = report.to_json()
    assert facts["unknown"] == 4 * facts["classes"]["unknown"] > 0
    known = [r for r in report.rates if r.scored]
    assert facts["pass_at"]["1"] == pytest.approx(np.mean([r.right / r.scored for r in known]))


def test_a_killed_probe_repeats_and_loses_nothing(recipe, monkeypatch, tmp_path) -> None:
    whole = use(monkeypatch, FakeModel())
    probe(recipe, FOUR, tmp_path / "whole", quiet)
    use(monkeypatch, FakeModel(fail_at=200))
    with pytest.raises(KeyboardInterrupt):
        probe(recipe, FOUR, tmp_path / "out", quiet)
    with (tmp_path / "out" / RATES).open("a") as file:
        file.write('{"id": "torn')
    second = use(monkeypatch, FakeModel())
    probe(recipe, FOUR, tmp_path / "out", quiet)
    assert (tmp_path / "out" / RATES).read_bytes() == (tmp_path / "whole" / RATES).read_bytes()
    assert len(second.asked) == len(whole.asked) - 32 * 4
    assert len(whole.asked) == len(set(whole.asked))


def test_two_probes_of_one_folder_do_not_ask_twice(recipe, monkeypatch, tmp_path) -> None:
    model = use(monkeypatch, FakeModel())
    with lock_run(tmp_path / "out"), pytest.raises(RunInUse, match="in use by process"):
        probe(recipe, FOUR, tmp_path / "out", quiet)
    assert not model.asked


def test_other_settings_need_another_folder(recipe, monkeypatch, tmp_path) -> None:
    use(monkeypatch, FakeModel())
    probe(recipe, Probing(4, max_prompts=3), tmp_path / "out", quiet)
    grown = probe(recipe, Probing(4, max_prompts=5), tmp_path / "out", quiet)
    assert len(grown.rates) == 5
    with pytest.raises(ConfigError, match="rollouts_per_prompt was 4, now 8"):
        probe(recipe, Probing(8), tmp_path / "out", quiet)
    warmer = load_recipe("recipe.yaml", ["rollouts.temperature=0.5"])
    with pytest.raises(ConfigError, match="sampling was"):
        probe(warmer, FOUR, tmp_path / "out", quiet)


@pytest.fixture
def table(recipe, monkeypatch, tmp_path) -> Path:
    use(monkeypatch, FakeModel())
    probe(recipe, FOUR, tmp_path / "out", quiet)
    return tmp_path / "out" / RATES


def reading(table: Path, *overrides: str) -> Recipe:
    return load_recipe("recipe.yaml", [f"data.probe={table}", *overrides])


def load(recipe: Recipe):
    return load_prompts(check_inputs(recipe), recipe.model.path)


def test_a_run_begins_with_the_table_as_a_first_visit(table) -> None:
    data = load(reading(table, "data.filter={solved_after: 1, hopeless_after: 1}"))
    counts = [r.right for r in read_rates(table).values()]
    metrics = data.metrics()
    assert metrics["data/visited"] == len(counts)
    assert metrics["data/success_rate"] == pytest.approx(np.mean(counts) / 4)
    assert metrics["data/solved"] == counts.count(4)
    assert metrics["data/hopeless"] == counts.count(0)
    drawn = [number(p.prompt_id) for p in data.take(8)]
    assert all(i % 5 in (1, 2, 3) for i in drawn)
    again = load(reading(table, "data.filter={solved_after: 1, hopeless_after: 1}"))
    again.load_state_dict(json.loads(json.dumps(data.state_dict())))
    assert [p.prompt_id for p in again.take(8)] == [p.prompt_id for p in data.take(8)]


def test_prompts_near_the_target_are_drawn_first(table) -> None:
    sampling = "data.sampling={type: difficulty, target_rate: 0.5, min_weight: 0.001}"
    data = load(reading(table, sampling))
    drawn = [number(p.prompt_id) % 5 for _ in range(6) for p in data.take(8)]
    assert drawn.count(2) > drawn.count(0) + drawn.count(4)


def test_prompts_that_the_admission_left_out_have_no_visit(table) -> None:
    data = load(reading(table, "data.filter={solved_after: 1}"))
    name = next(n for n, r in read_rates(table).items() if r.right == 4)
    before = data.metrics()
    data.admit((), {name: "eval_copy"}, {})
    assert data.metrics()["data/solved"] == before["data/solved"] - 1
    assert data.metrics()["data/visited"] == before["data/visited"] - 1


def test_a_changed_table_is_another_data_set(table) -> None:
    wanted = "data.filter={solved_after: 1}"
    state = load(reading(table, wanted)).state_dict()
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match=r"data\.probe"):
        load(reading(table, wanted)).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "rows.jsonl/9999"}, r"no training prompt has the id 'rows.jsonl/9999'"),
        ({"right": 9}, r"rates.jsonl:1: .*scored, right and unknown are \(4, 9, 0\)"),
        ({"class": "solved"}, r"rates.jsonl:1: .*class is 'solved', its counts say"),
        ({"more": 1}, r"rates.jsonl:1: .*it must hold class"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(table, change, message) -> None:
    lines = table.read_text().splitlines()
    row = next(json.loads(line) for line in lines if json.loads(line)["class"] == "learnable")
    table.write_text(json.dumps({**row, **change}) + "\n")
    with pytest.raises(DataError, match=message):
        load(reading(table, "data.filter={solved_after: 1}"))


def test_a_table_of_other_settings_is_refused(table, tmp_path) -> None:
    wanted = "data.filter={solved_after: 1}"
    with pytest.raises(ConfigError, match=r"data.probe.*sampling was"):
        check_inputs(reading(table, wanted, "rollouts.temperature=0.5"))
    with pytest.raises(ConfigError, match=r"data.probe.*reward was"):
        check_inputs(reading(table, wanted, "reward=boxed_math"))
    with pytest.raises(ConfigError, match=r"data.probe.*no such file; `plait probe` writes it"):
        check_inputs(reading(tmp_path / "none.jsonl", wanted))
    (table.parent / "probe.json").unlink()
    with pytest.raises(ConfigError, match=r"data.probe.*probe.json.*no such file"):
        check_inputs(reading(table, wanted))


def test_table_and_reader_belong_together(table) -> None:
    with pytest.raises(ConfigError, match=r"data.probe = .*nothing reads it"):
        reading(table)
    with pytest.raises(ConfigError, match=r"algorithm.skip_out_of_reach_steps: needs data.probe"):
        load_recipe("recipe.yaml", ["algorithm.skip_out_of_reach_steps=3"])
    reading(table, "algorithm.skip_out_of_reach_steps=3")


def test_a_gate_sees_what_is_out_of_reach(table) -> None:
    recipe = reading(table, "algorithm.skip_out_of_reach_steps=3")
    data, algorithm = load(recipe), recipe.build_algorithm()
    algorithm.use_prompts(data)
    prompts = data.peek(ROWS)
    plan = algorithm.plan(prompts, (), 2)
    skipped = {number(p.prompt_id) for p in plan.experts}
    assert skipped == {i for p in prompts if (i := number(p.prompt_id)) % 5 == 0 and i % 2}
    assert len(plan.requests) + len(plan.experts) == len(prompts)
    assert not algorithm.plan(prompts, (), 3).experts


@pytest.mark.parametrize(
    ("n", "right", "size"), [(4, 0, 2), (4, 1, 2), (6, 3, 4), (5, 5, 3), (8, 4, 8)]
)
def test_signal_chance_is_the_share_of_mixed_groups(n: int, right: int, size: int) -> None:
    groups = list(combinations([True] * right + [False] * (n - right), size))
    assert len(groups) == comb(n, size)
    mixed = np.mean([any(g) and not all(g) for g in groups])
    assert signal_chance(n, right, size) == pytest.approx(mixed)


@pytest.mark.parametrize(("n", "size"), [(0, 1), (1, 1), (8, 8), (16, 4)])
def test_failure_chance_is_the_posterior_of_a_failed_group(n: int, size: int) -> None:
    # The mean of (1 - p)^size under Beta(1/2, n + 1/2), with p = sin^2 of an angle.
    angles = (np.arange(200_000) + 0.5) * (np.pi / 2) / 200_000
    weights = np.cos(angles) ** (2 * n)
    assert failure_chance(n, size) == pytest.approx(
        np.average(np.cos(angles) ** (2 * size), weights=weights), rel=1e-6
    )


def test_a_report_without_known_scores_claims_nothing() -> None:
    report = ProbeReport([Rate(0, 0, 2, False)], 2, None)
    facts = report.to_json()
    assert facts["pass_at"] == {}
    assert not {"signal_share", "low"} & facts.keys()
    assert facts["traces_worth_buying"] == 0
    assert "more than any prompt's known scores" in "\n".join(report.lines())
