"""A Ray cluster with its job server, as `ray start --head` makes it: own folder, ports and token, loopback only."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.engine.rendezvous import free_port

ROOT = Path(__file__).parents[2]
START_SECONDS = 60.0


@dataclass(frozen=True)
class RayHead:
    folder: Path
    gcs: int
    dashboard: int
    token: str
    process: subprocess.Popen[bytes]
    environ: Mapping[str, str]
    """For commands of a user of this cluster."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def run(
        self, *command: str, cwd: Path, timeout: float = 240, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=cwd,
            env={**self.environ, **environ},
            text=True,
            timeout=timeout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def get(self, path: str) -> Any:
        """What the job server answers to its owner."""
        request = urllib.request.Request(f"{self.url}{path}")
        request.add_header("Authorization", f"Bearer {self.token}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def kill(self) -> None:
        """SIGKILL of everything that this head started."""
        for pid in processes_below(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def processes_below(pid: int) -> list[int]:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return []


def user_environ(**more: str) -> dict[str, str]:
    """Of a person who works in this environment, without what the test process knows of other clusters."""
    known = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTEST_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{known['PATH']}"
    return {**known, "PATH": path, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", **more}


@contextlib.contextmanager
def ray_head(environ: Mapping[str, str], num_cpus: int = 4) -> Iterator[RayHead]:
    """Killed at the end, whatever happens; `ray stop` would end every cluster of this machine."""
    folder = Path(tempfile.mkdtemp(prefix="plait-ray-", dir="/tmp"))  # socket paths must be short
    gcs, dashboard, agent = free_port(), free_port(), free_port()
    token = secrets.token_hex(32)
    (folder / "token").write_text(token)
    shared = user_environ(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(folder / "token"),
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
        RAY_USAGE_STATS_ENABLED="0",
        **environ,
    )
    command = ["ray", "start", "--head", "--block", f"--port={gcs}", f"--num-cpus={num_cpus}"]
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--temp-dir={folder / 'ray'}", "--object-store-memory=200000000"]
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=shared, stdout=log, stderr=log, start_new_session=True
        )
    user = {**shared, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    head = RayHead(folder, gcs, dashboard, token, process, user)
    try:
        wait_until_served(head)
        yield head
    finally:
        head.kill()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_served(head: RayHead) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            head.get("/api/jobs/")
            return
        except (OSError, urllib.error.URLError):
            said = (head.folder / "start.log").read_text()
            assert head.process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.2)
