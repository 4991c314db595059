"""Ray for one run: join the cluster of the job that runs us, or start a private one on this machine.

A private one listens on the loopback interface alone and asks every caller for a token. A cluster that is joined
(`RAY_ADDRESS`, which Ray sets in a job) belongs to others: where anybody who reaches its ports could run code on it,
the run refuses to start.
"""

from __future__ import annotations

import getpass
import ipaddress
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.client import HTTPException
from pathlib import Path
from typing import Any

import plait

from ..engine import guard
from ..engine.errors import ClusterError

# glibc returns every large tensor to the system and page-faults the next one; these settings keep them.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "268435456",
}
INSECURE = "PLAIT_INSECURE"
"""Environment variable: 1 lets a run start on a cluster that is open to anybody."""
ASK_SECONDS = 3.0
GUARD_SECONDS = 5.0
SHORT = 24
"""Characters: Ray appends 70, and the path of a socket has room for 107."""


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Ray is up inside; a cluster that was started here ends with it, one that was up before stays."""
    os.environ["PYTHONPATH"] = python_path()
    joins = bool(os.environ.get("RAY_ADDRESS"))
    if not joins:
        keep_private()
    elif "://" in os.environ["RAY_ADDRESS"]:
        raise ClusterError(
            f"RAY_ADDRESS = {os.environ['RAY_ADDRESS']}: a run joins a cluster from one of its nodes, as HOST:PORT of "
            "the head (6379); `plait submit` trains there through the job server; without RAY_ADDRESS the run has a "
            "cluster of its own on this machine"
        )
    import ray

    if ray.is_initialized():
        yield
        return
    # A job's own runtime environment and ours are both wanted; ours holds its PYTHONPATH too.
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with nullcontext() if joins else guarded() as folder:
        context = start_ray(joins, folder)
        if threading.current_thread() is threading.main_thread():
            signal.signal(
                signal.SIGTERM, on_sigterm
            )  # Ray's own would end the process there and then
        try:
            refuse_exposed(context.dashboard_url)
            yield
        finally:
            ray.shutdown()


def start_ray(joins: bool, folder: str | None) -> Any:
    """Raises ClusterError where the cluster to join does not answer."""
    import ray

    try:
        return ray.init(
            address=None if joins else "local",
            logging_level=logging.ERROR,
            log_to_driver=False,
            include_dashboard=None if joins else False,
            runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}},
            _temp_dir=folder,
        )
    except ConnectionError as error:
        if not joins:
            raise
        raise ClusterError(
            f"RAY_ADDRESS = {os.environ['RAY_ADDRESS']}: {error}; start Ray there, or give this process the cluster's "
            "token; without RAY_ADDRESS the run has a cluster of its own on this machine"
        ) from error


@contextmanager
def guarded() -> Iterator[str]:
    """Whatever is started inside ends with this process, however that ends, and so does the folder that is yielded.

    Ray's own helpers would notice only after a minute, and its logs and vLLM's sockets would stay for ever.
    """
    place = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="plait-ray-", dir=place if len(place) < SHORT else "/tmp")
    mine = {
        guard.RUN: secrets.token_hex(8),
        # Ray's agents write their titles over their environment, and with it over the guard's mark.
        "SPT_NOENV": "1",
        "TMPDIR": folder,
        "VLLM_RPC_BASE_PATH": folder,
        # What torch compiles is a cache that later runs use.
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        or f"{place}/torchinductor_{getpass.getuser()}",
    }
    before = {name: os.environ.get(name) for name in mine}
    watching = guard.start(guard.RUN, mine[guard.RUN], folder)
    os.environ.update(mine)
    try:
        yield folder
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        try:
            watching.communicate(timeout=GUARD_SECONDS)
        except subprocess.TimeoutExpired:
            watching.kill()
            watching.wait()


def keep_private() -> None:
    """The cluster that this process starts next listens on 127.0.0.1, and its token is its owner's alone."""
    # Read when ray is imported: false makes it take the loopback interface for the node's address.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Ray would kill a lost worker's whole group, with the tracker that unlinks its shared memory; the guard does not.
    os.environ.setdefault("RAY_process_group_cleanup_enabled", "0")
    # Its head would remember the last 100,000 calls, for a dashboard that is not there.
    os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    ensure_token()


def ensure_token() -> None:
    """Ray would write a token that every user of the machine can read, and with RAY_AUTH_MODE=token set by hand waits
    for ever where there is none."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_MODE") == "disabled":
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if path.is_file() and path.stat().st_size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mode 600
    with os.fdopen(fd, "w") as file:
        file.write(secrets.token_hex(32))
    try:
        if path.exists():  # empty: it was refused above otherwise
            os.replace(draft, path)
        else:
            os.link(
                draft, path
            )  # whole or not at all, and never over the one that another run made meanwhile
    except FileExistsError:
        pass
    finally:
        Path(draft).unlink(missing_ok=True)


def refuse_exposed(dashboard: str | None) -> None:
    """ClusterError where the cluster listens beyond this machine and asks nobody for a token."""
    import ray

    if os.environ.get(INSECURE) == "1" or asks_for_token(dashboard):
        return
    addresses = sorted({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})
    reachable = [a for a in addresses if not ipaddress.ip_address(a).is_loopback]
    if reachable:
        raise ClusterError(
            f"the Ray cluster at {', '.join(reachable)} asks nobody for a token: whoever reaches its ports can run "
            "code on it. Make a token (`ray get-auth-token --generate`), give every node the same, and start Ray with "
            f"RAY_AUTH_MODE=token; or accept it with --insecure or {INSECURE}=1"
        )


def asks_for_token(dashboard: str | None) -> bool:
    """By this process's own mode, and by the cluster itself where it has a dashboard."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    if not is_token_auth_enabled():
        return False
    return not dashboard or not answers_anybody(f"http://{dashboard}/api/jobs/")


def answers_anybody(url: str) -> bool:
    """Whether a call without a token is served. A dashboard that cannot be reached from here tells nothing."""
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=ASK_SECONDS):
            return True
    except (OSError, HTTPException):
        return False


def python_path() -> str:
    """What workers need to import this very plait, installed or not. Ray itself adds the driver's folder."""
    package = str(Path(plait.__path__[0]).parent)
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys(p for p in (package, *known) if p))


# What libraries want to be told when a process starts; torch itself is told by the learner.
DETERMINISTIC = {
    "PYTHONHASHSEED": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
}


def learner_env(*, deterministic: bool = False) -> dict[str, str]:
    """Environment of learner ranks."""
    fixed = DETERMINISTIC if deterministic else {}
    return {**ALLOCATOR, **fixed, "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}


def import_from_here() -> None:
    """Let `module:function` in a recipe name a file of the current folder; installed packages come first."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
