"""How the learner's ranks meet: a store at rank 0, which listens on rank 0's own address and nowhere else.

torch would listen on every interface of the machine, and nothing in its protocol asks who calls. On one machine the
ranks meet, and gloo talks, on the loopback interface; a single rank opens no port at all.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist
from torch.distributed import HashStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from .errors import LearnerError

if TYPE_CHECKING:
    from .learner import Rank


def join_ranks(rank: Rank, backend: Literal["gloo", "nccl"], timeout: timedelta) -> None:
    """Make this process a member of torch's default group. Raises what torch raises after `timeout`."""
    if ipaddress.ip_address(rank.address).is_loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = make_store(rank, timeout)
    dist.init_process_group(
        backend, store=store, rank=rank.index, world_size=rank.world_size, timeout=timeout
    )


def make_store(rank: Rank, timeout: timedelta) -> Any:
    if rank.world_size == 1:
        return HashStore()
    leads = rank.index == 0
    return TCPStore(
        rank.address,
        rank.port,
        rank.world_size,
        is_master=leads,
        timeout=timeout,
        master_listen_fd=listen(rank) if leads else None,
    )


def listen(rank: Rank) -> int:
    try:
        return socket.create_server((rank.address, rank.port)).detach()
    except OSError as error:
        raise LearnerError(
            f"learner rank {rank.index} cannot listen on {rank.address}:{rank.port}: {error.strerror}. Somebody took "
            "the port since it was found free; start the run again"
        ) from error


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]
