"""Ray for one run: join the cluster of the job that runs us, or start one on this machine."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import plait

# glibc returns every large tensor to the system and page-faults the next one; these settings keep them.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "268435456",
}


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Ray is up inside; a cluster that was started here ends with it, one that was up before stays."""
    os.environ["PYTHONPATH"] = python_path()
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(
        logging_level=logging.ERROR,
        log_to_driver=False,
        include_dashboard=False if "RAY_ADDRESS" not in os.environ else None,
        runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}},
    )
    try:
        yield
    finally:
        ray.shutdown()


def python_path() -> str:
    """What workers need to import this very plait, installed or not. Ray itself adds the driver's folder."""
    package = str(Path(plait.__path__[0]).parent)
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys(p for p in (package, *known) if p))


def learner_env() -> dict[str, str]:
    """Environment of learner ranks."""
    return {**ALLOCATOR, "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}


def import_from_here() -> None:
    """Let `module:function` in a recipe name a file of the current folder; installed packages come first."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
