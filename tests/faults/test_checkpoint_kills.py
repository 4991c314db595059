"""F12: a process killed anywhere in a save leaves a run that goes on to the same bits."""

from __future__ import annotations

import pytest
from small_run import STEPS, checkpoints_of, contents, exit_code, start

PLACES = [
    "checkpoint.begun:2",
    "checkpoint.snapshot_taken:2",
    "checkpoint.learner_begun:2",
    "checkpoint.learner_opened:2",
    "checkpoint.tensor_written:95",
    "checkpoint.learner_written:2",
    "checkpoint.state_written:2",
    "checkpoint.manifest_written:2",
    "checkpoint.files_synced:2",
    "checkpoint.renamed:2",
    "checkpoint.folder_synced:2",
    "durable.partial_written:2",
    "checkpoint.committed:2",
    "checkpoint.pruning:1",
    "checkpoint.begun:1",
    "checkpoint.renamed:1",
]


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, tmp_path_factory) -> dict[int, str]:
    """Step -> digest of the learner's state, of a run that nobody kills; `keep` lets two of them remain at a time."""
    found: dict[int, str] = {}
    folder = tmp_path_factory.mktemp("uninterrupted")
    for steps in (2, STEPS):
        assert exit_code(start(tiny_model, folder, steps=steps)) == 0
        found |= contents(checkpoints_of(folder))
    assert sorted(found) == list(range(1, STEPS + 1))
    return found


def survive(model, folder, place: str, expected: dict[int, str]) -> None:
    """Killed at `place`, the run holds a checkpoint of before or after, and reaches the same bits when it goes on."""
    assert exit_code(start(model, folder, f"kill:{place}")) == -9, place
    said: list[str] = []
    saved = checkpoints_of(folder, said).latest()
    # Before the first pointer is written, it is said that there is none.
    assert not said or place == "checkpoint.renamed:1", f"{place}: {said}"
    assert (saved is None) == (place == "checkpoint.begun:1"), place
    for step, digest in contents(checkpoints_of(folder)).items():
        assert digest == expected[step], (place, step)
    assert exit_code(start(model, folder)) == 0, place
    found = contents(checkpoints_of(folder))
    assert found == {step: expected[step] for step in (STEPS - 1, STEPS)}, place
    left = {path.name for path in folder.iterdir()}
    assert left == {"latest", *(f"step-{step:06d}" for step in found)}, place


def test_f12_killed_at_every_failpoint_of_a_save(tiny_model, tmp_path, uninterrupted, measured):
    for i, place in enumerate(PLACES):
        survive(tiny_model, tmp_path / str(i), place, uninterrupted)
    measured("F12", f"{len(PLACES)} of {len(PLACES)} resumed to the same bits, silent fallbacks 0")
