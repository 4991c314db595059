"""A checkpoint is complete or invisible; the parts here only record what they are asked to keep."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from plait.engine.checkpoint import STATE_FILE, Checkpoints, RunState
from plait.engine.config import CheckpointConfig
from plait.engine.errors import CheckpointError
from plait.engine.evaluation import EvalResult
from plait.engine.types import UpdateReport


class Keeper:
    """Stands for algorithm, data source and learner: holds one number."""

    def __init__(self, value: int = 0, fail: bool = False) -> None:
        self.value, self.fail = value, fail

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]

    def save(self, folder):
        Path(folder).mkdir()
        (Path(folder) / "weights").write_text(str(self.value))
        if self.fail:
            raise OSError("disk full")

    def load(self, folder):
        self.value = int((Path(folder) / "weights").read_text())


def save(checkpoints: Checkpoints, step: int, keeper: Keeper | None = None) -> Path:
    state = RunState(step=step, policy_version=step, tokens={"policy": 10 * step})
    state.eval_before = EvalResult(0.5, 0.4, 0.6, 0.5, 8, 8, 0, 3.0)
    part: object = keeper or Keeper(step)
    return checkpoints.save(state, part, part, part)  # pyright: ignore[reportArgumentType]


def restore(checkpoints: Checkpoints) -> tuple[RunState, list[int]]:
    parts: list = [Keeper(), Keeper(), Keeper()]
    state = checkpoints.restore(*parts)
    return state, [part.value for part in parts]


def test_everything_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    save(checkpoints, 3)
    state, values = restore(Checkpoints(tmp_path, CheckpointConfig()))
    assert (state.step, state.policy_version, state.tokens) == (3, 3, {"policy": 30})
    assert state.eval_before is not None
    assert asdict(state.eval_before)["accuracy"] == 0.5
    assert values == [3, 3, 3]


def test_no_checkpoint_is_a_fresh_start(tmp_path):
    state, values = restore(Checkpoints(tmp_path, CheckpointConfig()))
    assert state == RunState()
    assert values == [0, 0, 0]


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2))
    for step in (2, 4, 10):
        save(checkpoints, step)
    assert [path.name for path in checkpoints.complete()] == ["step-000004", "step-000010"]


def test_a_save_that_fails_leaves_the_previous_one_in_force(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    save(checkpoints, 1)
    with pytest.raises(OSError, match="disk full"):
        save(checkpoints, 2, Keeper(2, fail=True))
    assert restore(checkpoints)[0].step == 1
    assert [path.name for path in checkpoints.complete()] == ["step-000001"]
    save(checkpoints, 2)
    assert restore(checkpoints)[0].step == 2


def test_a_pointer_to_nothing_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    folder = save(checkpoints, 1)
    (folder / STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match="step-000001"):
        restore(checkpoints)


def test_state_is_json(tmp_path):
    folder = save(Checkpoints(tmp_path, CheckpointConfig()), 1)
    assert set(json.loads((folder / STATE_FILE).read_text())) == {"run", "algorithm", "data"}


def test_weights_that_did_not_change_keep_their_version():
    state = RunState()
    state.advance([])
    state.advance(
        [UpdateReport("main", 1.0, {}, 0.1, {"policy": 5}), UpdateReport("main", 1.0, {}, 0.1)]
    )
    assert (state.step, state.policy_version, state.optimizer_steps) == (2, 1, 2)
    assert state.tokens == {"policy": 5}
