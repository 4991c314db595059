"""`plait ask` on the tiny model: answers add up, and what cannot be answered has a reason."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from typer.testing import CliRunner

from end_to_end.command_line import tiny_recipe, write_recipe
from plait.algorithms import ALGORITHMS
from plait.engine.errors import ConfigError, DataError
from plait.engine.saved_batch import SavedBatch, read_batch, save_rounds, to_bytes
from plait.engine.types import Demonstration, Prompt, Rollout, RolloutGroup, Score
from plait.launch.ask import ask, find_question
from plait.launch.cli import app


def make_group(i, rewards, prefix=0, demonstrated=True):
    rng = np.random.default_rng(i)
    solution = (*rng.integers(3, 300, 5).tolist(), 2)
    found = (Demonstration(solution, str(i), piece_lengths=(2, 3)),) if demonstrated else ()
    messages = ({"role": "user", "content": "?"},)
    prompt = Prompt(f"p{i}", messages, (5, 6, 7), str(i), demonstrations=found)
    rollouts = []
    for index in range(len(rewards)):
        own = tuple(rng.integers(3, 300, 4).tolist())
        ids = (*solution[:prefix], *own)
        rollouts.append(Rollout(f"p{i}", index, ids, prefix, (-5.7,) * 4, 0, "stop", "x"))
    scores = tuple(
        Score.unknown("late") if r is None else Score.ok(r, answer=f"answer {place}")
        for place, r in enumerate(rewards)
    )
    return RolloutGroup(prompt, tuple(rollouts), scores)


GROUPS = [make_group(0, (1, 0, 0)), make_group(1, (0, 0, 0)), make_group(2, (0, 1, None))]


def save_batch(path, step, prompts, groups):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(to_bytes(path, SavedBatch(step, *save_rounds(prompts, [((), groups)]))))


@pytest.fixture
def run(tiny_model, tmp_path):
    """A run folder with one batch of step 7."""
    recipe = tiny_recipe(tiny_model, run={"name": "asked", "dir": str(tmp_path)}, loop={"steps": 9})
    folder = tmp_path / "asked"
    folder.mkdir()
    write_recipe(folder, "config.yaml", recipe)
    save_batch(folder / "batches" / "step-000007.json", 6, [g.prompt for g in GROUPS], GROUPS)
    return folder


def test_a_batch_comes_back_as_it_was(run):
    batch = read_batch(run / "batches" / "step-000007.json")
    assert batch.step == 6
    assert batch.rollout_groups == GROUPS


def test_a_prompt_that_was_asked_again_with_a_hint_keeps_both_wordings(run):
    hinted = replace(GROUPS[0], prompt=replace(GROUPS[0].prompt, token_ids=(9, 9)))
    path = run / "batches" / "step-000008.json"
    save_batch(path, 0, [g.prompt for g in GROUPS], [*GROUPS, hinted])
    assert read_batch(path).rollout_groups == [*GROUPS, hinted]
    (grpo,) = ask(find_question(path, None, None), ["grpo"], None)
    assert grpo.policy_tokens == 32, "the hinted rollouts are another method's"


def test_every_method_answers_or_says_why_not(run):
    answers = ask(find_question(run, None, None), list(ALGORITHMS), None)
    assert list(dict.fromkeys(a.algorithm for a in answers)) == list(ALGORITHMS)
    by_name = {answer.algorithm: answer for answer in answers}
    unanswered = {name: a.reason for name, a in by_name.items() if a.reason is not None}
    assert "starts with one" in unanswered.pop("prefix_rft")
    assert "starts with one" in unanswered.pop("uft")
    assert "asks for 6 more" not in unanswered.pop("stages")
    for name in ("bread", "ghpo", "regft"):
        assert "more, of" in unanswered.pop(name)
    assert unanswered == {}
    for answer in answers:
        if answer.reason is not None:
            continue
        assert answer.loss is not None
        assert answer.gradient_norm is not None
        # The groups are smaller than polychromic's sets of 4: one set, which differs from no other.
        assert (answer.gradient_norm > 0) == (answer.algorithm != "polychromic")
    chord = asdict(by_name["chord"])
    assert (chord["expert_tokens"], chord["policy_tokens"]) == (18, 32)
    expert, policy = chord["expert_gradient_norm"], chord["policy_gradient_norm"]
    share, cosine = chord["expert_gradient_share"], chord["gradient_cosine"]
    assert share == pytest.approx(expert / (expert + policy))
    whole = (expert**2 + policy**2 + 2 * cosine * expert * policy) ** 0.5
    assert chord["gradient_norm"] == pytest.approx(whole)
    assert by_name["grpo"].gradient_cosine is None
    assert by_name["sft"].policy_tokens == 0
    assert by_name["hpt"].expert_tokens == 6, "one question is not solved"


def test_a_later_step_moves_the_schedules(run):
    question = find_question(run, None, None)
    (early,), (late,) = (map(asdict, ask(question, ["chord"], step)) for step in (0, 100))
    assert early["expert_gradient_share"] > late["expert_gradient_share"]


def test_rollouts_with_prefixes_go_to_methods_that_force_them(run):
    groups = [make_group(0, (1, 0), prefix=2), make_group(1, (0, 1), prefix=2)]
    path = run / "batches" / "step-000008.json"
    save_batch(path, 0, [], groups)
    uft, grpo = ask(find_question(path, None, None), ["uft", "grpo"], None)
    assert uft.reason is None
    assert uft.expert_tokens == 8
    assert grpo.reason == "it trains plain rollouts, and the batch has none"


def test_no_demonstrations_no_answer(run):
    path = run / "batches" / "step-000008.json"
    save_batch(path, 0, [], [make_group(0, (1, 0), demonstrated=False)])
    sft, grpo = ask(find_question(path, None, None), ["sft", "grpo"], None)
    assert "no prompt of the batch has one" in (sft.reason or "")
    assert grpo.reason is None


def test_the_command_prints_json_and_a_table(run):
    arguments = ["ask", str(run), "--algorithm", "chord,prefix_rft,nonsense"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["rollouts"] == 9
    assert [a["algorithm"] for a in found["answers"]] == ["chord", "prefix_rft", "nonsense"]
    assert "no such algorithm" in found["answers"][2]["reason"]
    done = CliRunner().invoke(app, arguments)
    assert "cosine" in done.stdout
    assert "prefix_rft: it forces prefixes" in done.stdout


def test_a_run_without_batches_and_a_broken_file_are_named(tmp_path, run):
    (run / "batches" / "step-000007.json").write_text("{}")
    with pytest.raises(DataError, match=r"step-000007.json: not a saved batch"):
        find_question(run, None, None)
    with pytest.raises(ConfigError, match="save_batch_every"):
        find_question(tmp_path, None, None)
