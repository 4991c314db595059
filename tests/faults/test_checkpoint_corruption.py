"""F13: whatever happens to the bytes of a checkpoint, it is found before they are used."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_run import STEPS, checkpoints_of, exit_code, start

CORRUPTIONS, HEALTHY = 100, 20


def flip(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(bytes(content))


def cut(path: Path, dice: random.Random) -> None:
    with path.open("r+b") as file:
        file.truncate(dice.randrange(path.stat().st_size))


def delete(path: Path, dice: random.Random) -> None:
    path.unlink()


KINDS: list[Callable[[Path, random.Random], None]] = [flip, cut, delete]


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert exit_code(start(tiny_model, folder)) == 0
    return folder


def test_f13_damage_is_found_before_it_is_used(finished, tmp_path, measured):
    dice, found = random.Random(13), 0
    newest = f"step-{STEPS:06d}"
    artefacts = [finished / "latest", *(finished / newest).rglob("*.*")]
    assert len(artefacts) == 4, "the pointer, the manifest, the state, the learner's file"
    for number in range(CORRUPTIONS):
        artefact = artefacts[number % len(artefacts)]
        kept = tmp_path / "kept"
        shutil.copy(artefact, kept)
        KINDS[number // len(artefacts) % len(KINDS)](artefact, dice)
        said: list[str] = []
        saved = checkpoints_of(finished, said).latest()
        shutil.copy(kept, artefact)
        assert saved is not None
        expected = STEPS if artefact.name == "latest" else STEPS - 1
        assert saved.manifest.step == expected, (number, artefact)
        found += artefact.name in said[0] and "is used instead" in said[-1]
    false_alarms = 0
    for _ in range(HEALTHY):
        said = []
        saved = checkpoints_of(finished, said).latest()
        assert saved is not None
        false_alarms += bool(said) or saved.folder.name != newest
    assert (found, false_alarms) == (CORRUPTIONS, 0)
    measured(
        "F13",
        f"detected {found}/{CORRUPTIONS}, previous used, false alarms {false_alarms}/{HEALTHY}",
    )
