"""A checkpoint is complete and verified, or invisible; the parts here only record what they are asked to keep."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from plait.engine.checkpoint import POINTER, STATE_FILE, Checkpoints
from plait.engine.config import CheckpointConfig
from plait.engine.durable import write_durably
from plait.engine.errors import CheckpointError
from plait.engine.evaluation import EvalResult
from plait.engine.manifest import MANIFEST, Manifest, sealed, unsealed
from plait.engine.run_state import RunState
from plait.engine.types import UpdateReport


class Keeper:
    """Stands for algorithm, data source and learner: holds one number."""

    def __init__(self, value: int = 0, fail: bool = False, slow: bool = False) -> None:
        self.value, self.fail, self.slow = value, fail, slow
        self.folder = Path()

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]

    def save(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir()
        self.record = write_durably(self.folder / "weights", str(self.value))

    def saved(self, *, wait):
        if self.fail:
            raise CheckpointError("disk full")
        return None if self.slow and not wait else [self.record]

    def load(self, paths):
        (path,) = paths
        self.value = int(Path(path).read_text())


def open_folder(folder: Path, **config: int) -> tuple[Checkpoints, list[str]]:
    """The checkpoints of a run, and what they say."""
    said: list[str] = []
    return Checkpoints(folder, CheckpointConfig(**config), say=said.append), said


def begin(
    checkpoints: Checkpoints, step: int, keeper: Keeper | None = None, accuracy: float | None = None
) -> None:
    state = RunState(step=step, policy_version=step, tokens={"policy": 10 * step})
    state.eval_before = EvalResult(0.5, 0.4, 0.6, 0.5, 8, 8, 0, 3.0)
    if accuracy is not None:
        state.note_evaluation(EvalResult(accuracy, 0.0, 1.0, accuracy, 8, 8, 0, 3.0))
    part: object = keeper or Keeper(step)
    checkpoints.save(state, part, part, part)  # pyright: ignore[reportArgumentType]


def save(checkpoints: Checkpoints, step: int, accuracy: float | None = None) -> Path:
    begin(checkpoints, step, accuracy=accuracy)
    assert checkpoints.settle(wait=True) == step
    return checkpoints.complete()[-1]


def restore(checkpoints: Checkpoints) -> tuple[RunState, list[int]]:
    parts: list = [Keeper(), Keeper(), Keeper()]
    state = checkpoints.restore(*parts)
    return state, [part.value for part in parts]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_everything_comes_back(tmp_path):
    save(open_folder(tmp_path)[0], 3)
    checkpoints, said = open_folder(tmp_path)
    state, values = restore(checkpoints)
    assert (state.step, state.policy_version, state.tokens) == (3, 3, {"policy": 30})
    assert state.eval_before is not None
    assert asdict(state.eval_before)["accuracy"] == 0.5
    assert values == [3, 3, 3]
    assert not said


def test_no_checkpoint_is_a_fresh_start(tmp_path):
    state, values = restore(open_folder(tmp_path / "none")[0])
    assert state == RunState()
    assert values == [0, 0, 0]


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints, _ = open_folder(tmp_path, keep=2)
    for step, accuracy in ((2, 0.5), (4, 0.75), (6, 0.75), (8, None), (10, 0.25)):
        save(checkpoints, step, accuracy)
    kept = [path.name for path in checkpoints.complete()]
    assert kept == ["step-000004", "step-000008", "step-000010"]
    best = checkpoints.best_saved()
    assert best is not None
    assert (best.folder.name, best.manifest.accuracy) == ("step-000004", 0.75)


def test_nothing_is_visible_before_it_is_written(tmp_path):
    checkpoints, _ = open_folder(tmp_path)
    begin(checkpoints, 1, Keeper(1, slow=True))
    assert checkpoints.settle(wait=False) is None
    assert checkpoints.complete() == []
    assert checkpoints.pending
    begin(checkpoints, 2, Keeper(2, slow=True))  # commits the one before first
    assert [path.name for path in checkpoints.complete()] == ["step-000001"]
    assert checkpoints.settle(wait=True) == 2
    assert not checkpoints.pending


def test_a_save_that_fails_leaves_the_previous_one_in_force(tmp_path):
    checkpoints, _ = open_folder(tmp_path)
    save(checkpoints, 1)
    before = names(tmp_path)
    begin(checkpoints, 2, Keeper(2, fail=True))
    with pytest.raises(CheckpointError, match="disk full"):
        checkpoints.settle(wait=False)
    assert names(tmp_path) == before
    assert restore(checkpoints)[0].step == 1
    save(checkpoints, 2)
    assert restore(checkpoints)[0].step == 2


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path):
    checkpoints, _ = open_folder(tmp_path)
    save(checkpoints, 1)
    (save(checkpoints, 2) / STATE_FILE).unlink()
    checkpoints, said = open_folder(tmp_path)
    assert restore(checkpoints)[0].step == 1
    assert "step-000002/state.json" in said[0]
    assert "step-000001 is intact and is used instead" in said[1]
    # It must not count among the kept ones, and it is not deleted either.
    assert names(tmp_path) == ["latest", "step-000001", "step-000002.damaged"]


def test_without_an_intact_one_there_is_no_fresh_start(tmp_path):
    checkpoints, _ = open_folder(tmp_path)
    for step in (1, 2):
        (save(checkpoints, step) / STATE_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match=r"(?s)step-000002.*step-000001.*begin anew"):
        restore(checkpoints)
    assert "step-000002" in names(tmp_path)


def test_a_checkpoint_of_before_manifests_is_not_taken_for_a_fresh_start(tmp_path):
    (tmp_path / "step-000004").mkdir()
    (tmp_path / POINTER).write_text("step-000004")
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        restore(open_folder(tmp_path)[0])


def test_a_pointer_to_what_is_gone_is_named(tmp_path):
    checkpoints, said = open_folder(tmp_path)
    save(checkpoints, 1)
    folder = save(checkpoints, 2)
    for file in sorted(folder.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    folder.rmdir()
    assert restore(checkpoints)[0].step == 1
    assert "names step-000002, which is missing" in said[0]


def test_a_folder_under_another_name_is_refused(tmp_path):
    checkpoints, said = open_folder(tmp_path)
    save(checkpoints, 1)
    save(checkpoints, 2).rename(tmp_path / "step-000009")
    assert restore(checkpoints)[0].step == 1
    assert "holds the checkpoint of step 2" in " ".join(said)


def test_what_interrupted_saves_left_is_removed(tmp_path):
    checkpoints, _ = open_folder(tmp_path)
    save(checkpoints, 1)
    for name in (".step-000002.ab.partial", ".step-000000.cd.removed"):
        (tmp_path / name / "learner").mkdir(parents=True)
    (tmp_path / ".latest.partial").write_text("x")
    restore(checkpoints)
    assert names(tmp_path) == ["latest", "step-000001"]


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../step-000001/state.json", "learner/../../x", ""]
)
def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path, path):
    checkpoints, _ = open_folder(tmp_path)
    folder = save(checkpoints, 1)
    content = unsealed(folder / MANIFEST)
    content["files"][0]["path"] = path
    (folder / MANIFEST).write_text(sealed(content))
    with pytest.raises(CheckpointError, match="leads out of it"):
        Manifest.read(folder).verify(folder)


@pytest.mark.parametrize("place", ["learner/weights", "learner", STATE_FILE, MANIFEST, "."])
def test_links_are_refused(tmp_path, place):
    checkpoints, _ = open_folder(tmp_path / "run")
    folder = save(checkpoints, 1)
    place = folder if place == "." else folder / place
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"no plain file|is a link"):
        restore(checkpoints)


def test_state_is_json(tmp_path):
    folder = save(open_folder(tmp_path)[0], 1)
    assert set(json.loads((folder / STATE_FILE).read_text())) == {"run", "algorithm", "data"}


def test_weights_that_did_not_change_keep_their_version():
    state = RunState()
    state.advance([])
    state.advance(
        [UpdateReport("main", 1.0, {}, 0.1, {"policy": 5}), UpdateReport("main", 1.0, {}, 0.1)]
    )
    assert (state.step, state.policy_version, state.optimizer_steps) == (2, 1, 2)
    assert state.tokens == {"policy": 5}
