"""Fixtures that several folders share; heavy ones live as long as the session."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from catalogue import FAULTS

os.environ.setdefault("HF_HUB_OFFLINE", "1")
REPORT = "PLAIT_FAULTS_REPORT"
"""Environment variable: a folder that takes one JSON file for each test; without it nothing is written."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random two-layer Llama with tied embeddings and its tokenizer; heads as wide as vLLM on CPU wants."""
    from tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", heads=2, kv_heads=1)


@pytest.fixture(scope="session")
def ray_session():
    """One local Ray cluster for all tests that need one."""
    from plait.launch.cluster import ray_cluster

    # Workers import the classes that tests define.
    known = os.environ.get("PYTHONPATH", "")
    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here / "faults"), known])
    with ray_cluster():
        yield


def pytest_collection_modifyitems(items) -> None:
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def measured(request) -> Callable[[str, str], None]:
    """`measured("F12", "11 of 11 resumable")`: the figure of a row. Call it after the assertions on that figure."""

    def note(row: str, figure: str) -> None:
        assert row in FAULTS, f"{row} is not in the catalogue"
        folder = os.environ.get(REPORT)
        if folder is None:
            return
        name = re.sub(r"\W+", "_", f"{row}_{request.node.nodeid}_{figure}")[:180]
        test = request.node.nodeid.partition("[")[0]
        content = {"row": row, "measured": figure, "test": test}
        Path(folder, f"{name}.json").write_text(json.dumps(content))

    return note
