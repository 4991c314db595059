"""What the driver and a scoring process say to each other, and how it is cut into frames.

A frame is a length (4 bytes, big endian) and a payload. Towards the process the payload is a pickled `Load` or
`Task`; back comes JSON, so that a reply can only be data, and a malformed one is recognised.

Messages are sent ahead of time. What may begin is said by tickets, the ids of messages, in a pipe of their own: the
process takes one before it begins with a message, and the driver can take back those that it has not taken.
"""

import json
import math
import os
import pickle
import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from ..engine.types import Score, ScoreStatus

MAX_REPLY_BYTES = 65536
MAX_REASON_CHARS = MAX_ANSWER_CHARS = 500
_LENGTH = struct.Struct("!I")
_TICKET = struct.Struct("!Q")
TICKET_BYTES = _TICKET.size


@dataclass(frozen=True, slots=True)
class RewardSource:
    """Where a reward function comes from.

    >>> RewardSource("numeric", "reward.function", '{"relative_tolerance": 0.01}').pickled is None
    True
    """

    name: str
    path: str
    """Recipe or data field that holds the name."""
    options: str = "{}"
    """Keyword arguments, as JSON."""
    pickled: bytes | None = None
    """The function itself (cloudpickle), where Python code passed it as an object."""


@dataclass(frozen=True, slots=True)
class Load:
    """Import a reward function."""

    id: int
    source: RewardSource


@dataclass(frozen=True, slots=True)
class Task:
    """Grade one completion. `prompt` is a pickled Prompt: user code decides what unpickling its metadata does."""

    id: int
    source: RewardSource
    prompt: bytes
    completion: str


def pack(payload: bytes) -> bytes:
    return _LENGTH.pack(len(payload)) + payload


def pack_message(message: Load | Task) -> bytes:
    return pack(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def pack_ticket(message_id: int) -> bytes:
    return _TICKET.pack(message_id)


def unpack_tickets(data: bytes) -> list[int]:
    return [message_id for (message_id,) in _TICKET.iter_unpack(data)]


def pack_score(task_id: int, score: Score, seconds: float, *, last: bool) -> bytes:
    """The reply to a Task that took `seconds`; `last` says that the process ends after it. Too long a reply becomes
    UNKNOWN.
    """
    reply = {
        "id": task_id,
        "event": "score",
        "status": score.status.value,
        "reward": score.reward,
        "parts": dict(score.parts),
        "reason": score.reason[:MAX_REASON_CHARS],
        "answer": score.answer and shorten(score.answer),
        "seconds": seconds,
        "last": last,
    }
    payload = json.dumps(reply, allow_nan=False).encode()
    if len(payload) > MAX_REPLY_BYTES:
        reason = f"returned parts of {len(payload)} bytes, more than {MAX_REPLY_BYTES}"
        return pack_score(task_id, Score.unknown(reason), seconds, last=last)
    return pack(payload)


def shorten(answer: str) -> str:
    """A long answer cut to MAX_ANSWER_CHARS, with a digest of the whole: different answers stay different."""
    if len(answer) <= MAX_ANSWER_CHARS:
        return answer
    digest = blake2b(answer.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"{answer[: MAX_ANSWER_CHARS - len(digest) - 1]} {digest}"


def pack_event(task_id: int, event: str, **fields: str) -> bytes:
    return pack(json.dumps({"id": task_id, "event": event, **fields}).encode())


def unpack_score(reply: dict[str, Any]) -> Score:
    """The inverse of `pack_score`. Raises KeyError, TypeError or ValueError on a malformed reply."""
    if ScoreStatus(reply["status"]) is ScoreStatus.UNKNOWN:
        return Score.unknown(str(reply["reason"]))
    reward = float(reply["reward"])
    if not math.isfinite(reward):
        raise ValueError(f"a reward of {reward}")
    answer = reply["answer"]
    if not isinstance(answer, str | None):
        raise TypeError(f"an answer of type {type(answer).__name__}")
    return Score.ok(reward, {str(k): float(v) for k, v in reply["parts"].items()}, answer)


def take_reply(buffer: bytearray) -> dict[str, Any] | None:
    """Cut the first whole reply off `buffer`; None while there is none. Raises ValueError on anything else."""
    if len(buffer) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(buffer)
    if length > MAX_REPLY_BYTES:
        raise ValueError(f"a reply of {length} bytes")
    end = _LENGTH.size + length
    if len(buffer) < end:
        return None
    payload = bytes(buffer[_LENGTH.size : end])
    del buffer[:end]
    reply = json.loads(payload)
    if not isinstance(reply, dict):
        raise ValueError("a reply that is no object")
    return reply


class FrameReader:
    """Payloads from a blocking file descriptor, many of them with one read."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = bytearray()

    def take(self) -> bytes | None:
        """Block for the next payload; None at the end of the stream."""
        if not self._fill(_LENGTH.size):
            return None
        end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
        if not self._fill(end):
            return None
        payload = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        return payload

    def _fill(self, size: int) -> bool:
        while len(self._buffer) < size:
            piece = os.read(self._fd, max(65536, size - len(self._buffer)))
            if not piece:
                return False
            self._buffer += piece
        return True


def write_all(fd: int, data: bytes) -> None:
    """Block until everything is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def read_exactly(fd: int, count: int) -> bytes | None:
    """Block for so many bytes; None at the end of the stream."""
    data = bytearray()
    while len(data) < count:
        piece = os.read(fd, count - len(data))
        if not piece:
            return None
        data += piece
    return bytes(data)
