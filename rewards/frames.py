"""What the driver and a scoring process say to each other, and how it is cut into frames.

A frame is a length (4 bytes, big endian) and a payload. Towards the process the payload is a pickled `Load` or
`Task`; back comes JSON, so that a reply can only be data, and a malformed one is recognised.
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


def pack_score(task_id: int, score: Score, *, last: bool) -> bytes:
    """The reply to a Task; `last` says that the process ends after it. Too long a reply becomes UNKNOWN."""
    reply = {
        "id": task_id,
        "event": "score",
        "status": score.status.value,
        "reward": score.reward,
        "parts": dict(score.parts),
        "reason": score.reason[:MAX_REASON_CHARS],
        "answer": score.answer and shorten(score.answer),
        "last": last,
    }
    payload = json.dumps(reply, allow_nan=False).encode()
    if len(payload) > MAX_REPLY_BYTES:
        reason = f"returned parts of {len(payload)} bytes, more than {MAX_REPLY_BYTES}"
        return pack_score(task_id, Score.unknown(reason), last=last)
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


def read_frame(fd: int) -> bytes | None:
    """Block for the next payload; None at the end of the stream."""
    header = _read_exactly(fd, _LENGTH.size)
    return None if header is None else _read_exactly(fd, _LENGTH.unpack(header)[0])


def write_all(fd: int, data: bytes) -> None:
    """Block until everything is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _read_exactly(fd: int, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        piece = os.read(fd, count - len(data))
        if not piece:
            return None
        data += piece
    return bytes(data)
