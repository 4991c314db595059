"""F29: a pickle that runs code lies where a run reads a file, and nothing runs it."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import checkpoints_of, exit_code, start

from end_to_end.command_line import tiny_recipe, write_recipe
from plait.engine.checkpoint import POINTER, STATE_FILE
from plait.engine.config import LearnerConfig
from plait.engine.errors import PlaitError
from plait.engine.journal import Journal
from plait.engine.learner_state import StateReader
from plait.engine.manifest import MANIFEST
from plait.engine.model import load_model
from plait.engine.run_state import RunState
from plait.engine.saved_batch import read_batch
from plait.launch.admission import read_settled
from plait.launch.config import load_recipe
from plait.launch.identity import recorded
from plait.launch.model import check_model
from plait.launch.run import check_inputs, load_run
from plait.launch.run_lock import lock_run
from plait.launch.run_status import read_status


class Canary:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.path),)


def plain(path: Path, canary: Canary) -> None:
    path.write_bytes(pickle.dumps(canary))


def as_torch(path: Path, canary: Canary) -> None:
    torch.save({"weight": canary}, path)


def as_old_torch(path: Path, canary: Canary) -> None:
    torch.save(canary, path, _use_new_zipfile_serialization=False)


def as_numpy(path: Path, canary: Canary) -> None:
    """What numpy.load(allow_pickle=True) would run."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(canary))


HOSTILE: list[Callable[[Path, Canary], None]] = [plain, as_torch, as_old_torch, as_numpy]


def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def learner_model(folder: Path) -> Any:
    check_model(str(folder))
    return load_model(str(folder), LearnerConfig())


class Place:
    """A run folder, its data and its model, of which each file in turn becomes hostile."""

    def __init__(self, folder: Path, model: Path, checkpoints: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.run, self.model = folder / "run", folder / "model"
        shutil.copytree(model, self.model)
        self.run.mkdir()
        shutil.copytree(checkpoints, self.run / "checkpoints")
        self.newest = sorted((self.run / "checkpoints").glob("step-*"))[-1]
        self.data = folder / "data.jsonl"
        self.recipe = folder / write_recipe(
            folder, "r.yaml", tiny_recipe(self.model, data={"path": str(self.data)})
        )

    def readers(self) -> dict[Path, Callable[[Path], Any]]:
        """Every file that a run loads, with what loads it."""
        run, newest, journal = self.run, self.newest, self.run / "journal"
        (learner,) = (newest / "learner").iterdir()

        def latest(_: Path) -> Any:
            return checkpoints_of(run / "checkpoints", []).latest()

        return {
            learner: latest,
            learner.with_suffix(".again"): lambda path: StateReader([path]),  # past the digest
            newest / STATE_FILE: latest,
            newest / MANIFEST: latest,
            run / "checkpoints" / POINTER: latest,
            newest / "learner" / "mp_rank_00_model_states.pt": latest,
            run / "identity.json": lambda _: recorded(run),
            run / "config.yaml": load_run_of(run),
            run / "lock": lambda _: lock_run(run).__enter__(),
            run / "status.json": lambda _: read_status(run),
            run / "admission.json": read_settled,
            run / "batches.json": read_batch,
            journal / "step-000001.json": lambda _: Journal(journal, 0, print).recall(RunState()),
            self.recipe: lambda path: load_recipe(path),
            self.data: lambda _: check_inputs(load_recipe(self.recipe)),
            self.model / "model.safetensors": lambda _: learner_model(self.model),
            self.model / "pytorch_model.bin": lambda _: learner_model(self.model),
            self.model / "config.json": lambda _: learner_model(self.model),
            self.model / "generation_config.json": lambda _: learner_model(self.model),
            self.model / "tokenizer.json": lambda _: tokenizer(self.model),
            self.model / "tokenizer_config.json": lambda _: tokenizer(self.model),
            self.model / "special_tokens_map.json": lambda _: tokenizer(self.model),
        }


def load_run_of(run: Path) -> Callable[[Path], Any]:
    return lambda _: load_run(run)


@pytest.fixture(scope="module")
def checkpoints(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    assert exit_code(start(tiny_model, folder, steps=2)) == 0
    return folder


def test_f29_no_pickle_is_ever_run(tmp_path, tiny_model, checkpoints, measured):
    proof = tmp_path / "proof"
    plain(tmp_path / "canary", Canary(proof))
    pickle.loads((tmp_path / "canary").read_bytes())
    assert proof.is_dir(), "the canary sings where somebody does unpickle it"
    tried, fired = 0, 0
    for make in HOSTILE:
        place = Place(tmp_path / make.__name__, tiny_model, checkpoints)
        for path, read in place.readers().items():
            kept = path.read_bytes() if path.exists() else None
            path.parent.mkdir(exist_ok=True)
            sign = tmp_path / f"sign-{tried}"
            make(path, Canary(sign))
            with suppress(Exception):  # each library has its own for what it cannot read
                read(path)
            fired += sign.exists()
            tried += 1
            path.unlink() if kept is None else path.write_bytes(kept)
    assert fired == 0
    measured("F29", f"canaries fired {fired}/{tried}")


def test_pickled_weights_are_refused_by_name(tmp_path, tiny_model):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    as_torch(folder / "pytorch_model.bin", Canary(tmp_path / "sign"))
    with pytest.raises(PlaitError, match=r"pickled weights are not read"):
        check_model(str(folder))
    with pytest.raises(OSError, match="safetensors"):
        load_model(str(folder), LearnerConfig())
    assert not (tmp_path / "sign").exists()
