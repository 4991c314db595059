"""`plait resume --verify`, and the account of every prompt: over runs that are interrupted and go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from in_process_run import Dice, believe, parts_of, play, sections, strike

from end_to_end.command_line import no_verifier, read_lines, tiny_recipe, write_recipe
from end_to_end.test_every_algorithm import CONFIGS
from plait.engine import loop
from plait.engine.errors import CheckpointError
from plait.engine.replay import NothingSampled, Replayed, replay
from plait.launch.config import load_recipe

STEPS = 5


@pytest.fixture
def make(tiny_model, tmp_path, monkeypatch):
    """(algorithm, changes of sections) -> its recipe, ready to play."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "sync", believe)
    rows = [
        {"prompt": f"{i} + 1 =", "answer": str(i + 1), "demonstration": f"Take {i}. So {i + 1}."}
        for i in range(16)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Of every three prompts one is never right, one always, one sometimes; every eleventh text is not graded.
    (tmp_path / "uneven.py").write_text(
        "def grade(prompt, completion):\n"
        "    if sum(map(ord, completion)) % 11 == 0:\n"
        "        return None\n"
        "    kind = int(prompt.answer) % 3\n"
        "    return float([0, 1, len(completion) % 2][kind])\n"
    )

    def build(name: str, **changes: Any) -> Any:
        recipe = tiny_recipe(
            tiny_model,
            run={"name": name, "dir": str(tmp_path), "deterministic": True},
            reward={**no_verifier("uneven:grade"), "max_unknown_fraction": 0.5},
            loop={"steps": STEPS, "prompts_per_step": 4},
            eval={"num_prompts": 2},
            checkpoint={"every": 2},
        )
        recipe["algorithm"] = sections(name, CONFIGS) | changes
        return load_recipe(tmp_path / write_recipe(tmp_path, f"{name}.yaml", recipe))

    return build


def repeat(recipe: Any, model: Path) -> Replayed:
    with parts_of(recipe, NothingSampled(), model) as parts:
        return replay(recipe.loop, recipe.eval, recipe.sampling, parts)


def test_the_last_steps_are_the_ones_that_were_recorded(make, tiny_model):
    recipe = make("grpo", advantage="group_mean")
    assert play(recipe, Dice(), tiny_model) is not None
    before = {p: p.read_bytes() for p in sorted(recipe.folder.rglob("*")) if p.is_file()}
    found = repeat(recipe, tiny_model)
    assert (found.start, found.steps, found.differences) == (4, (5,), ())
    assert "step 5" in found.lines()[0]
    assert "equal" in found.lines()[0]
    after = {p: p.read_bytes() for p in sorted(recipe.folder.rglob("*")) if p.is_file()}
    assert before == after, "verifying changes nothing"


def test_after_a_kill_the_steps_beyond_the_checkpoint_are_repeated(make, tiny_model):
    recipe = make("relift")
    assert play(recipe, Dice(), tiny_model, strike("step.journaled", 4)) is None
    found = repeat(recipe, tiny_model)
    assert (found.start, found.steps, found.differences) == (2, (3,), ())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda line: {**line, "weights": "0" * 16}, "weights"),
        (lambda line: {**line, "updates": [[n, x, norm * (1 + 1e-15)] for n, x, norm in line["updates"]]}, "updates"),
        (lambda line: {**line, "prompts": line["prompts"][::-1]}, "prompts"),
    ],
)  # fmt: skip
def test_what_differs_is_told(change, told, make, tiny_model):
    recipe = make("grpo", advantage="group_mean")
    assert play(recipe, Dice(), tiny_model) is not None
    path = recipe.folder / "steps.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines[:-1], change(lines[-1])]))
    (difference,) = repeat(recipe, tiny_model).differences
    assert difference.startswith(f"step 5: {told}")


def test_another_learner_is_found_out_and_a_lost_journal_is_named(make, tiny_model):
    recipe = make("grpo", advantage="group_mean")
    assert play(recipe, Dice(), tiny_model) is not None
    rate = recipe.learner.learning_rate * (1 + 1e-6)
    other = recipe.model_copy(
        update={"learner": recipe.learner.model_copy(update={"learning_rate": rate})}
    )
    assert any("weights" in line for line in repeat(other, tiny_model).differences)
    (recipe.folder / "journal" / "step-000005.json").unlink()
    with pytest.raises(CheckpointError, match="does not hold the rollouts of step 5"):
        repeat(recipe, tiny_model)


def test_verdicts_on_demonstrations_are_asked_for_once(make, tiny_model, tmp_path):
    """Also in steps without rollouts: a verifier that is near its deadline may say something else the next time."""
    asked = tmp_path / "asked"
    (tmp_path / "moody.py").write_text(
        "def grade(prompt, completion):\n"
        f"    with open({str(asked)!r}, 'a') as file:\n"
        "        file.write(prompt.answer + ' ')\n"
        "    return float(int(prompt.answer) % 2)\n"
    )
    recipe = make("sft", expert_loss={"type": "rift"})
    assert recipe.reward is not None
    reward = recipe.reward.model_copy(update={"function": "moody:grade"})
    recipe = recipe.model_copy(update={"reward": reward})
    assert play(recipe, Dice(), tiny_model, strike("step.journaled", 3)) is None
    first = asked.read_text().split()
    assert len(first) == 3 * 4 + recipe.eval.num_prompts
    # No checkpoint was complete: the run begins anew, with the journal.
    assert play(recipe, Dice(), tiny_model, strike("step.journaled", 3)) is None
    again = asked.read_text().split()[len(first) :]
    assert len(again) == recipe.eval.num_prompts


@pytest.mark.parametrize("name", ["grpo", "relift", "chord"])
def test_every_prompt_is_trained_dropped_with_a_reason_or_queued(name, make, tiny_model):
    changes = {"drop_uniform_groups": True} if name == "grpo" else {}
    recipe = make(name, **changes)
    for number, place in ((2, "step.journaled"), (2, "step.updated"), (1, "step.journaled")):
        assert play(recipe, Dice(), tiny_model, strike(place, number)) is None
    with parts_of(recipe, Dice(), tiny_model) as parts:
        state = loop.train(recipe.loop, recipe.eval, recipe.sampling, parts)
        position = parts.data.state_dict()["prompts"]["drawn"]
        waiting = [p.prompt_id for p in getattr(parts.algorithm, "buffer", ())]
    assert state.step == STEPS
    lines = read_lines(recipe.folder / "steps.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    outcomes = [tuple(pair) for line in lines for pair in line["prompts"]]
    assert len(outcomes) == sum(position), "each prompt that left the stream is accounted for, once"
    kinds = {outcome for _, outcome in outcomes}
    reasons = {"uniform_rewards", "unknown_score", "left_out", "repeated_in_step", "not_planned"}
    assert kinds <= {"trained", "queued", *(f"dropped: {reason}" for reason in reasons)}
    assert "trained" in kinds
    if name == "grpo":
        assert "dropped: uniform_rewards" in kinds
    assert {prompt for prompt, outcome in outcomes if outcome == "queued"} <= {
        *waiting,
        *trained_later(lines),
    }
    rows = [row for row in read_lines(recipe.folder / "metrics.jsonl") if "prompts/drawn" in row]
    for row, line in zip(rows, lines, strict=True):
        counted = sum(
            v for k, v in row.items() if k.startswith("prompts/") and k != "prompts/drawn"
        )
        assert counted == row["prompts/drawn"] == len(line["prompts"])


def trained_later(lines: list[dict[str, Any]]) -> set[str]:
    return {name for line in lines for name, outcome in line["prompts"] if outcome == "trained"}


def test_a_changed_recipe_makes_another_run(make, tiny_model):
    """The record is of numbers, not of the fact that something ran: another seed is another run."""
    recipe = make("grpo", advantage="group_mean")
    assert play(recipe, Dice(), tiny_model) is not None
    other = recipe.model_copy(update={"run": recipe.run.model_copy(update={"seed": 9})})
    with pytest.raises(CheckpointError, match="does not hold the rollouts"):
        repeat(other, tiny_model)
