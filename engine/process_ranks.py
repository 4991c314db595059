"""Learner ranks as processes of this machine, joined over gloo, without Ray: for proofs and tests."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from .config import LearnerConfig
from .contracts import LossFn, Need
from .errors import LearnerError, PlaitError
from .learner import LearnerWorker, Rank
from .rendezvous import free_port
from .types import TokenSampling

CLOSE_SECONDS = 5.0


class ProcessRanks:
    """Implements learners.Ranks. The processes start once; `start` gives them one learner after another."""

    def __init__(self, world_size: int, timeout_seconds: float) -> None:
        self.world_size, self.timeout = world_size, timeout_seconds
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self._ends: list[Connection] = []
        self._processes: list[Any] = []
        for i in range(world_size):
            ours, theirs = context.Pipe()
            rank = Rank(i, world_size, port=port)
            # Daemons end with this process; if it is killed, the closed pipe ends them.
            process = context.Process(target=serve, args=(theirs, rank), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def start(
        self,
        model_path: str,
        config: LearnerConfig,
        losses: Mapping[str, LossFn],
        needs: Mapping[str, frozenset[Need]],
        token_sampling: TokenSampling | None = None,
        entropy_top_k: int | None = None,
    ) -> None:
        """A fresh LearnerWorker in every process, in the place of the one before."""
        head = {"token_sampling": token_sampling, "entropy_top_k": entropy_top_k}
        learner = (model_path, config, losses, needs, head)
        self.call("start", [learner] * self.world_size)

    def call(self, method: str, per_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Raises what the first failing rank raised, or LearnerError when one ended or is silent for too long."""
        for end, args in zip(self._ends, per_rank, strict=True):
            # Plain pickles: torch's own would pass tensors through shared memory, which containers have little of.
            send(end, (method, args))
        answers: dict[int, Any] = {}
        while len(answers) < self.world_size:
            waiting = {end: i for i, end in enumerate(self._ends) if i not in answers}
            ready = wait(list(waiting), self.timeout)
            if not ready:
                raise LearnerError(f"{method}: no answer of a rank within {self.timeout:.0f} s")
            for end in ready:
                assert isinstance(end, Connection)
                answers[waiting[end]] = receive(end, waiting[end], method)
        return [answers[i] for i in range(self.world_size)]

    def restart(self) -> None:
        raise LearnerError(
            "ranks of a proof are not restarted; see the traceback of the one that ended"
        )

    def status(self) -> Sequence[Mapping[str, Any]]:
        return ()

    def close(self) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(CLOSE_SECONDS)
            if process.is_alive():
                process.kill()


def send(end: Connection, call: tuple[str, tuple[Any, ...]]) -> None:
    try:
        end.send_bytes(pickle.dumps(call))
    except BrokenPipeError as error:
        raise LearnerError(f"a learner rank ended before {call[0]}; see its traceback") from error


def receive(end: Connection, rank: int, method: str) -> Any:
    try:
        answer = pickle.loads(end.recv_bytes())
    except (EOFError, ConnectionResetError) as error:
        raise LearnerError(
            f"learner rank {rank} ended during {method}; see its traceback"
        ) from error
    if isinstance(answer, PlaitError):
        raise answer
    return answer


def serve(end: Connection, rank: Rank) -> None:
    """A rank's process: answer calls until the pipe closes; errors that plait does not raise on purpose end it."""
    os.dup2(2, 1)  # what DeepSpeed prints must not mix with a program's output
    worker: LearnerWorker | None = None
    while True:
        try:
            method, args = pickle.loads(end.recv_bytes())
        except EOFError:
            return
        try:
            if method == "start":
                *learner, head = args
                worker = None  # free the one before first
                worker = LearnerWorker(*learner, rank=rank, **head)
                answer = None
            else:
                answer = getattr(worker, method)(*args)
        except PlaitError as error:
            answer = error
        end.send_bytes(pickle.dumps(answer))
