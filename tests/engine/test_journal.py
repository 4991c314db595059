"""The journal of rollouts: what fits comes back to the bit, what does not is named and left alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from plait.engine.errors import CheckpointError
from plait.engine.journal import Journal
from plait.engine.run_state import RunState
from plait.engine.saved_batch import read_batch
from plait.engine.types import (
    Demonstration,
    Prompt,
    Rollout,
    RolloutGroup,
    RolloutRequest,
    Sampling,
    Score,
)

STATE = RunState(step=4, policy_version=3, weights="0123456789abcdef")
ODD = (-0.1, -1e-310, -5e-324, -0.0, -math.inf, -1 / 3)


def round_of(name: str, hint: tuple[int, ...] = ()):
    demonstration = Demonstration((4, 2), "x", score=Score.unknown("slow"))
    prompt = Prompt(name, (), (1, *hint), metadata={"n": 1}, demonstrations=(demonstration,))
    request = RolloutRequest(prompt, 2, Sampling(6))
    rollouts = tuple(Rollout(name, i, (7,) * 6, 0, ODD, 3, "stop", "\ud7ff✓") for i in range(2))
    scores = (Score.ok(1 / 3, {"format": 0.1}, answer="7"), Score.unknown("deadline"))
    return [request], [RolloutGroup(prompt, rollouts, scores)]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def journal(tmp_path: Path, said: list[str]) -> Journal:
    return Journal(tmp_path / "journal", 5, said.append)


def again(journal: Journal, said: list[str]) -> Journal:
    """As the next process opens it."""
    return Journal(journal.folder, journal.seed, said.append)


def test_what_was_sampled_comes_back_to_the_bit(journal, said):
    rounds = [round_of("a"), round_of("a", hint=(9,))]
    journal.write(STATE, [rounds[0][0][0].prompt], rounds)
    entry = again(journal, said).recall(STATE)
    assert entry is not None
    assert [r.answer(requests) for r, (requests, _) in zip(entry.rounds, rounds, strict=True)] == [
        groups for _, groups in rounds
    ]
    found = entry.rollout_groups[0].rollouts[0].logprobs
    assert [x.hex() for x in found] == [x.hex() for x in ODD]
    assert not said


def test_a_round_that_asks_for_something_else_has_no_answer(journal):
    requests, groups = round_of("a")
    journal.write(STATE, [], [(requests, groups)])
    (saved,) = journal.recall(STATE).rounds
    (request,) = requests
    for other in (
        replace(request, n=3),
        replace(request, first_index=1),
        replace(request, prefix=(4,)),
        replace(request, sampling=Sampling(6, temperature=0.5)),
        replace(request, prompt=replace(request.prompt, prompt_id="b")),
        replace(request, prompt=replace(request.prompt, token_ids=(1, 2))),
    ):
        assert saved.answer([other]) is None
    assert saved.answer([]) is None


def test_verdicts_on_demonstrations_come_from_the_journal(journal):
    requests, groups = round_of("a")
    journal.write(STATE, [requests[0].prompt], [(requests, groups)])
    bare = replace(requests[0].prompt, demonstrations=(Demonstration((4, 2), "x"),))
    entry = journal.recall(STATE)
    assert entry.with_verdicts([bare]) == [requests[0].prompt]


def test_every_flipped_byte_and_every_cut_is_found(journal, said):
    journal.write(STATE, [], [round_of("a")])
    path = journal.path(STATE.step)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert again(journal, said).recall(STATE) is None, place
        path.write_bytes(whole[:place])
        assert again(journal, said).recall(STATE) is None, place
    assert len(said) == 2 * len(range(0, len(whole), 7))
    assert all("step-000005.json" in line and "sampled again" in line for line in said)
    path.write_bytes(whole)
    assert again(journal, said).recall(STATE) is not None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"weights": "fedcba9876543210"}, "other weights"),
        ({"policy_version": 4}, "policy version 3"),
        ({"step": 3}, "of step 4"),
    ],
)
def test_an_entry_of_another_policy_is_left_alone(journal, said, change, told):
    journal.write(STATE, [], [round_of("a")])
    state = replace(STATE, **change)
    journal.path(STATE.step).rename(journal.path(state.step)) if "step" in change else None
    assert again(journal, said).recall(state) is None
    assert told in said[0]


def test_an_entry_of_another_seed_is_left_alone(journal, said):
    journal.write(STATE, [], [round_of("a")])
    assert Journal(journal.folder, 6, said.append).recall(STATE) is None
    assert "seed 5" in said[0]


def test_after_a_repeated_update_the_next_entry_fits_by_its_chain(journal, said):
    """Without deterministic kernels a repeated update may end in other bits."""
    later = replace(STATE, step=5, policy_version=4, weights="a")
    journal.write(STATE, [], [round_of("a")])
    journal.write(later, [], [round_of("b")])
    moved = replace(later, weights="b")
    assert again(journal, said).recall(moved) is None
    replayed = again(journal, said)
    assert replayed.recall(STATE) is not None
    assert replayed.recall(moved) is not None
    # Another step in between, sampled anew, breaks the chain.
    torn = again(journal, said)
    torn.write(STATE, [], [round_of("a", hint=(3,))])
    assert torn.recall(moved) is None


def test_entries_are_kept_back_to_the_checkpoint_before_the_last(journal, tmp_path):
    for step in range(6):
        journal.write(replace(STATE, step=step), [], [round_of("a")])
    names = [f"step-{n:06d}.json" for n in range(1, 7)]
    journal.prune([])
    journal.prune([tmp_path / "step-000004"])
    assert sorted(path.name for path in journal.folder.iterdir()) == names
    journal.prune([tmp_path / f"step-{n:06d}" for n in (0, 2, 4)])
    assert sorted(path.name for path in journal.folder.iterdir()) == names[2:]


def test_a_full_disk_leaves_no_half_entry(journal, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("plait.engine.durable.os.fsync", full)
    with pytest.raises(
        CheckpointError, match=r"journal of rollouts could not be written: .*No space.*step-000005"
    ):
        journal.write(STATE, [], [round_of("a")])
    assert list(journal.folder.iterdir()) == []


def test_a_changed_batch_file_is_refused(journal):
    journal.write(STATE, [], [round_of("a")])
    path = journal.path(STATE.step)
    path.write_bytes(path.read_bytes().replace(b'"step":4', b'"step":5'))
    with pytest.raises(ValueError, match="sha256"):
        read_batch(path)
