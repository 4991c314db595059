"""Calls that nobody may answer: every port of a cluster, over HTTP and gRPC, without a token and with a wrong one."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

METHODS = (
    "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "ray.rpc.InternalKVGcsService/InternalKVKeys",
    "ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "ray.rpc.NodeManagerService/GetNodeStats",
    "ray.rpc.NodeManagerService/GetResourceLoad",
    "ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "ray.rpc.ObjectManagerService/FreeObjects",
)
PATHS = (
    ("GET", "/api/jobs/"),
    ("POST", "/api/jobs/"),
    ("POST", "/api/job_agent/jobs/"),
    ("GET", "/api/v0/actors"),
    ("GET", "/nodes?view=summary"),
    ("GET", "/api/cluster_status"),
    ("POST", "/get_or_create_runtime_env"),
)
SECONDS = 3.0


@dataclass(frozen=True)
class Listener:
    address: str
    port: int
    process: str


def listeners_of(pids: Sequence[int]) -> list[Listener]:
    """TCP ports that these processes listen on, as the kernel tells (/proc/net/tcp and tcp6)."""
    found = set()
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                address = connection.laddr.ip.removeprefix("::ffff:")  # pyright: ignore[reportAttributeAccessIssue]
                name = " ".join(psutil.Process(connection.pid).cmdline())[:60]
                found.add(Listener(address, connection.laddr.port, name))  # pyright: ignore[reportAttributeAccessIssue]
    return sorted(found, key=lambda one: one.port)


def accepted_calls(port: int, token: str | None) -> tuple[int, list[str]]:
    """How many calls were tried, and those that were served."""
    served = [what for what in PATHS if http_serves(port, token, *what)]
    return len(PATHS) + len(METHODS), [
        *map(" ".join, served),
        *(method for method in METHODS if grpc_serves(port, token, method)),
    ]


def http_serves(port: int, token: str | None, verb: str, path: str) -> bool:
    """Ray's pages of Prometheus counters, which answer anybody at any path with the same numbers, do not count."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    body = b'{"entrypoint": "touch /tmp/plait-intruder"}' if verb == "POST" else None
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request(verb, path, body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        counters = answer.read().startswith(b"# HELP")
        return answer.status < 400 and not counters
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def grpc_serves(port: int, token: str | None, method: str) -> bool:
    import grpc

    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.unary_unary(f"/{method}")
        try:
            call(b"", timeout=SECONDS, metadata=metadata)
        except grpc.RpcError:
            return False
        return True
