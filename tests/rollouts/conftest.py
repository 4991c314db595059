"""One Ray cluster for all tests of this folder; pools are started by the modules that need them."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Workers import the classes that tests define; pytest's own search path ends at this process.
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    if not ray.is_initialized():
        ray.init(
            include_dashboard=False,
            num_cpus=2,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
    yield
    ray.shutdown()
