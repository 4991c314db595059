"""Numbers a run reports: UNKNOWN is beside them, never in them."""

import json

import pytest

from plait.engine.metrics import (
    RunLog,
    report_metrics,
    rollout_metrics,
)
from plait.engine.run_state import RunState
from plait.engine.types import Prompt, Rollout, RolloutGroup, Score, UpdateReport
from plait.launch.console import PlainConsole

PROMPT = Prompt("p", (), (1, 2))


def group(*rewards, prompt=PROMPT):
    rollouts = [
        Rollout("p", i, (3,) * (i + 1), 0, (-1.0,) * (i + 1), 0, "length" if i else "stop", "")
        for i in range(len(rewards))
    ]
    scores = [Score.unknown("slow") if r is None else Score.ok(r, {"form": r / 2}) for r in rewards]
    return RolloutGroup(prompt, tuple(rollouts), tuple(scores))


def test_rollout_metrics():
    other = Prompt("q", (), (1, 2))
    metrics = rollout_metrics([group(1.0, 1.0), group(0.0, None, prompt=other)])
    assert metrics["reward/mean"] == pytest.approx(2 / 3)
    assert metrics["reward/unknown"] == 1
    assert metrics["groups/all_correct"] == 0.5
    assert metrics["groups/all_wrong"] == 0.5
    assert metrics["rollouts/truncated"] == 0.5
    assert metrics["tokens/generated"] == 6
    assert metrics["reward/part/form"] == pytest.approx(1 / 3)
    assert "reward/mean" not in rollout_metrics([group(None)]), "absent, not 0"


def test_a_later_round_counts_as_rollouts_but_not_as_the_prompts_own_attempt():
    metrics = rollout_metrics([group(0.0, 0.0), group(1.0, 1.0)])
    assert (metrics["rollouts/count"], metrics["reward/mean"]) == (4, 0.5)
    assert (metrics["groups/all_wrong"], metrics["groups/all_correct"]) == (1.0, 0.0)


def test_report_metrics_add_tokens_and_average_the_rest():
    reports = [
        UpdateReport("main", 1.0, {"loss": 2.0}, 0.1, {"policy": 3}),
        UpdateReport("main", 3.0, {"loss": 4.0, "kl": 1.0}, 0.1, {"policy": 4}),
        UpdateReport("sft", 5.0, {"loss": 1.0}, 0.1, {"expert": 2}),
    ]
    metrics = report_metrics(reports)
    assert (metrics["tokens/policy"], metrics["tokens/expert"]) == (7, 2)
    assert (metrics["main/loss"], metrics["main/grad_norm"], metrics["main/kl"]) == (3.0, 2.0, 1.0)
    assert metrics["sft/loss"] == 1.0


def test_a_resumed_log_forgets_what_lies_beyond_the_checkpoint(tmp_path, capsys):
    lines = [{"step": step, "x": step} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "x"'
    (tmp_path / "metrics.jsonl").write_text(text)
    log = RunLog(tmp_path, PlainConsole())
    log.begin(RunState(step=2), 5)
    log.step(RunState(step=3), [group(1.0)], {"reward/mean": 1.0})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[2]["reward/mean"] == 1.0
    assert "resuming after step 2 of 5" in capsys.readouterr().out
