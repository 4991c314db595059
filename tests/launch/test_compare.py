"""`plait compare`: which runs a comparison is made of, and the arithmetic of its report; no run is started."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from plait.engine.config import LoopConfig
from plait.engine.errors import ConfigError, LearnerError, Stopped
from plait.engine.loop import end_reason
from plait.engine.run_state import RunState
from plait.launch import compare
from plait.launch.compare import Budget, Outcome, check_same, plan_runs, read_variants
from plait.launch.compare_chart import Curve, Scale, draw_curves
from plait.launch.compare_report import collect, learning_curves, read_curve, write_report

BASE: dict[str, Any] = {
    "run": {"name": "base", "seed": 5},
    "model": "some/model",
    "algorithm": {"type": "chord", "rollouts_per_prompt": 3, "mu_peak": 0.5, "sampler_ratio_cap": 2.0},
    "data": {"type": "jsonl", "path": "data.jsonl", "seed": 7},
    "reward": "math",
    "loop": {"steps": 10},
}  # fmt: skip
TOKENS = Budget.parse("tokens=1000")


def plan(tmp_path, *labels, seeds=1, variants=None, base=BASE):
    file = None
    if variants is not None:
        file = tmp_path / "variants.yaml"
        file.write_text(yaml.safe_dump(variants))
    return plan_runs(base, labels, TOKENS, seeds, tmp_path / "out", read_variants(file))


def test_methods_differ_in_their_section_and_seeds_in_theirs(tmp_path):
    entries = plan(tmp_path, "chord", "grpo", "sft", seeds=2)
    assert [(e.label, e.seed) for e in entries] == [
        *[("chord", 5), ("grpo", 5), ("sft", 5)],
        *[("chord", 6), ("grpo", 6), ("sft", 6)],
    ]
    chord, grpo, sft = (e.recipe for e in entries[:3])
    assert chord.model_dump()["algorithm"]["mu_peak"] == 0.5
    assert grpo.model_dump()["algorithm"]["rollouts_per_prompt"] == 3
    assert grpo.model_dump()["algorithm"]["sampler_ratio_cap"] == 2.0
    assert sft.algorithm.type == "sft"
    assert [e.recipe.data.seed for e in entries] == [7, 7, 7, 8, 8, 8]
    assert {e.recipe.loop.max_trained_tokens for e in entries} == {1000}
    assert {e.recipe.loop.steps for e in entries} == {10}
    assert len({e.recipe.folder for e in entries}) == 6
    assert BASE["run"] == {"name": "base", "seed": 5}, "the base is not changed"


def test_a_variant_names_a_method_and_what_else_differs(tmp_path):
    stages = {
        "type": "stages",
        "stages": [{"steps": 3, "algorithm": {"type": "sft"}}, {"algorithm": {"type": "grpo"}}],
    }
    variant = {"algorithm": stages, "overrides": ["learner.learning_rate=1e-4"]}
    (entry,) = plan(tmp_path, "sft-then-grpo", variants={"sft-then-grpo": variant})
    assert [c.type for c in entry.recipe.algorithm.sections.values()] == ["sft", "grpo"]
    assert entry.recipe.learner.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("labels", "variants", "words"),
    [
        (["grop"], None, ["grop: algorithm.type = 'grop'", "no such algorithm"]),
        (["grpo", "grpo"], None, ["--algorithms", "once"]),
        (["grpo"], {"mine": {"algorithm": {"type": "sft"}}}, ["--variants = 'mine'", "not in --algorithms"]),
        (["mine"], {"mine": {"algoritm": {}}}, ["mine.algorithm", "required", "mine.algoritm"]),
        (["mine"], {"mine": {"algorithm": {"type": "sft", "x": 1}}}, ["mine: algorithm.x = 1", "unknown key"]),
        (["mine"], {"mine": {"algorithm": {"type": "sft"}, "overrides": ["loop.steps=0"]}}, ["mine: loop.steps = 0"]),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_label(tmp_path, labels, variants, words):
    with pytest.raises(ConfigError) as caught:
        plan(tmp_path, *labels, variants=variants)
    for word in words:
        assert word.lower() in str(caught.value).lower()


def test_evaluation_is_needed(tmp_path):
    with pytest.raises(ConfigError, match=r"eval.num_prompts = 0"):
        plan(tmp_path, "grpo", base={**BASE, "eval": {"num_prompts": 0}})


@pytest.mark.parametrize(
    "text", ["tokens", "tokens=0", "tokens=1.5", "steps=3", "seconds=-1", "tokens=x"]
)
def test_bad_budgets(text):
    with pytest.raises(ConfigError, match="--budget"):
        Budget.parse(text)


def test_budgets():
    assert Budget.parse("tokens=20_000").override == "loop.max_trained_tokens=20000"
    assert Budget.parse("seconds=90.5").override == "loop.max_seconds=90.5"


def test_a_run_ends_after_the_step_that_reaches_a_limit():
    config = LoopConfig(steps=10, max_trained_tokens=100, max_seconds=60)
    state = RunState(step=3, tokens={"policy": 60, "expert": 39, "computed": 500})
    assert end_reason(config, state) is None
    state.tokens["expert"] = 40
    assert end_reason(config, state) == "max_trained_tokens"
    assert end_reason(config, RunState(step=3, step_seconds=60.5)) == "max_seconds"
    assert end_reason(config, RunState(step=10)) == "steps"


def test_a_run_of_another_recipe_is_not_taken_for_this_one(tmp_path):
    (entry,) = plan(tmp_path, "grpo")
    check_same(entry.recipe)
    entry.recipe.folder.mkdir(parents=True)
    (entry.recipe.folder / "config.yaml").write_text(entry.recipe.to_yaml())
    check_same(entry.recipe)
    (other,) = plan(tmp_path, "grpo", base={**BASE, "loop": {"steps": 11}})
    with pytest.raises(ConfigError, match="another recipe"):
        check_same(other.recipe)


# ------------------------------------------------------------------------------------------- report


def summary(before, after, policy, expert, ended_by="max_trained_tokens"):
    return {
        "eval_before": {"accuracy": before},
        "eval_after": {"accuracy": after},
        "tokens": {"policy": policy, "expert": expert, "generated": 2 * policy, "computed": 1},
        "step_seconds": 10.0,
        "wall_seconds": {"total": 12.0},
        "steps": 4,
        "prompts": 16,
        "expert_stream": 0,
        "ended_by": ended_by,
    }


def metrics_lines(accuracy):
    evals = {"eval/low": 0.0, "eval/high": 1.0}
    return [
        {"step": 0, "eval/accuracy": 0.1, **evals},
        {"step": 1, "tokens/trained_so_far": 300, "time/steps_so_far": 2.0},
        {"step": 2, "tokens/trained_so_far": 700, "time/steps_so_far": 5.0},
        {"step": 2, "eval/accuracy": accuracy, **evals},
    ]


@pytest.fixture
def outcomes(tmp_path):
    entries = plan(tmp_path, "chord", "grpo", seeds=2)
    found = []
    for entry, after in zip(entries, (0.5, 0.2, 0.7, None), strict=True):
        folder = entry.recipe.folder
        folder.mkdir(parents=True)
        if after is None:
            found.append(Outcome(entry, None, "LearnerError: loss not finite"))
            continue
        rows = "".join(json.dumps(row) + "\n" for row in metrics_lines(after))
        (folder / "metrics.jsonl").write_text(rows)
        ended_by = "steps" if entry.label == "grpo" else "max_trained_tokens"
        found.append(Outcome(entry, summary(0.1, after, 600, 500, ended_by)))
    return found


def test_mean_and_spread_are_over_finished_seeds(outcomes):
    chord, grpo = collect(outcomes)
    after: Any = chord.spread("after")
    assert after.mean == pytest.approx(0.6)
    assert after.deviation == pytest.approx(0.1414213562)  # sqrt(2 * 0.1^2 / (2 - 1))
    assert after.percent() == "60.0 ± 14.1"
    alone: Any = grpo.spread("after")
    assert (alone.mean, alone.deviation, alone.percent()) == (0.2, None, "20.0")
    assert [run.failure for run in grpo.runs] == ["", "LearnerError: loss not finite"]


def test_a_curve_says_what_had_been_trained(outcomes):
    points = read_curve(outcomes[0].entry.recipe.folder / "metrics.jsonl")
    assert [(p.step, p.tokens, p.seconds, p.accuracy) for p in points] == [
        (0, 0, 0.0, 0.1),
        (2, 700, 5.0, 0.5),
    ]
    chord, _ = learning_curves(collect(outcomes), "tokens")
    assert chord.mean == [(0, pytest.approx(0.1)), (700, pytest.approx(0.6))]
    assert len(chord.runs) == 2


def test_the_report_holds_every_number(outcomes, tmp_path):
    write_report(outcomes, TOKENS, "plait compare base ...", "base", tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert (
        "| chord | 10.0 ± 0.0 | 60.0 ± 14.1 | 50.0, 70.0 | 600 ± 0 | 500 ± 0 | 1,200 ± 0 |" in text
    )
    assert "| grpo | 10.0 | 20.0 | 20.0, failed |" in text
    assert "* grpo, seed 6: failed: LearnerError: loss not finite" in text
    assert "* grpo, seed 5: all 4 steps of `loop.steps` came before the budget was spent" in text
    assert "1,000 trained tokens" in text
    assert "plait compare base ..." in text
    content = json.loads((tmp_path / "report.json").read_text())
    chord, grpo = content["methods"]
    assert chord["mean"]["after"]["mean"] == pytest.approx(0.6)
    assert chord["runs"][0]["curve"][1]["tokens"] == 700
    assert grpo["runs"][1]["failure"].startswith("LearnerError")
    assert ET.parse(tmp_path / "curves.svg").getroot().tag.endswith("svg")


def test_a_method_without_a_finished_run_is_a_row(outcomes, tmp_path):
    failed = [Outcome(o.entry, None, "RolloutError: gone") for o in outcomes]
    write_report(failed, TOKENS, "plait compare", "base", tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| chord | failed: RolloutError: gone |" in text


def test_points_lie_where_the_axes_say():
    curve = Curve("a <b>", [(0, 0.0), (50, 0.25)], [[(0, 0.0), (100, 0.5)]])
    scale = Scale.of([curve])
    assert (scale.x_max, scale.y_max) == (100, pytest.approx(0.55))
    assert scale.place((0, 0)) == "60.0,370.0"
    assert scale.place((100, scale.y_max)) == "600.0,20.0"
    assert "a &lt;b&gt;" in draw_curves([curve], "trained tokens")
    assert draw_curves([], "x").startswith("<svg")


def test_summary_fields_are_those_of_a_run():
    """The report reads what `summarize` writes."""
    from plait.launch.run import summarize

    state = RunState(step=4, tokens={"policy": 600, "expert": 500})
    recipe: Any = SimpleNamespace(
        run=SimpleNamespace(name="x"),
        algorithm=SimpleNamespace(type="sft"),
        model=SimpleNamespace(path="m"),
        loop=LoopConfig(steps=4),
    )
    streams = {"prompts": {"drawn": [3]}, "experts": {"drawn": [0]}}
    assert summary(0, 0, 0, 0).keys() <= summarize(recipe, state, streams, {}, 1.0).keys()


# --------------------------------------------------------------------------------------------- runs


class Workers:
    closed = 0

    def close(self):
        self.closed += 1


@pytest.mark.parametrize(
    ("state", "expected"),
    [("absent", {"overwrite": True, "resume": False}), ("checkpoint", {"overwrite": False, "resume": True})],
)  # fmt: skip
def test_an_interrupted_run_continues_from_its_checkpoint_or_starts_over(
    tmp_path, monkeypatch, state, expected
):
    (entry,) = plan(tmp_path, "grpo")
    checkpoints = entry.recipe.folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    if state == "checkpoint":
        (checkpoints / "step-000001").mkdir()
    calls = []

    def train(recipe, *, workers, **options):
        calls.append(options)
        return {"steps": 4}

    monkeypatch.setattr(compare, "train", train)
    workers: Any = Workers()
    assert compare.run_one(entry, workers, keep_models=False).summary == {"steps": 4}
    assert calls == [expected]
    assert not checkpoints.exists(), "a finished run keeps no model"
    (entry.recipe.folder / "summary.json").write_text('{"steps": 5}')
    assert compare.run_one(entry, workers, keep_models=False).summary == {"steps": 5}
    assert len(calls) == 1, "a finished run is not trained again"
    assert workers.closed == 0


def test_who_stops_a_comparison_stops_all_of_it(tmp_path, monkeypatch):
    (entry,) = plan(tmp_path, "grpo")

    def train(recipe, **options):
        raise Stopped("SIGTERM: stopped after step 1")

    monkeypatch.setattr(compare, "train", train)
    workers: Any = Workers()
    with pytest.raises(Stopped):
        compare.run_one(entry, workers, keep_models=False)


def test_a_failed_run_is_an_outcome_and_its_rollout_workers_are_not_used_again(
    tmp_path, monkeypatch
):
    (entry,) = plan(tmp_path, "grpo")

    def train(recipe, **options):
        raise LearnerError("loss not finite\nand more")

    monkeypatch.setattr(compare, "train", train)
    workers: Any = Workers()
    outcome = compare.run_one(entry, workers, keep_models=False)
    assert (outcome.summary, outcome.failure) == (None, "LearnerError: loss not finite")
    assert workers.closed == 1
