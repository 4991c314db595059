"""A reward function that does what its completion says, most of it terrible. Runs inside scoring processes only."""

import asyncio
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np

from plait.engine.types import Score, ScoreStatus


class Rude(BaseException):
    pass


def loop():
    while True:
        pass


def fork_bomb():
    for _ in range(200):  # bounded, should the scorer fail
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
    time.sleep(20)


def fork_and_return():
    os.fork()
    return 1.0


def flood():
    line = "x" * 9_999 + "\n"
    for _ in range(10_000):
        sys.stdout.write(line)
    return 1.0


def scribble():
    for fd in range(3, 4096):
        try:
            os.write(fd, b"\xff" * 64)
        except OSError:
            continue
    return 1.0


def close_standard():
    os.closerange(0, 3)
    return 1.0


def leave_processes():
    """Children in another session, and threads, outlive the call."""
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = subprocess.Popen(command, start_new_session=True)
    threading.Thread(target=time.sleep, args=(60,)).start()
    with open("left_behind.txt", "a") as file:
        file.write(f"{child.pid}\n{os.getpid()}\n")
    return 1.0


def many_threads():
    threading.stack_size(256 << 10)  # stacks count as memory
    threads = [threading.Thread(target=time.sleep, args=(0.3,)) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 1.0


def throw(error):
    raise error


def recurse(n=0):
    return recurse(n + 1)


ACTIONS = {
    "fine": lambda: 1.0,
    "loop": loop,
    "regex": lambda: re.match(r"(a+)+$", "a" * 64 + "b"),
    "sleep": lambda: time.sleep(60),
    "big_power": lambda: len(str(9**9**9)),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "alloc": lambda: len(bytearray(10 << 30)),
    "fork_bomb": fork_bomb,
    "fork_and_return": fork_and_return,
    "segfault": lambda: ctypes.string_at(0),
    "sys_exit": lambda: sys.exit(3),
    "os_exit": lambda: os._exit(3),
    "interrupt": lambda: throw(KeyboardInterrupt()),
    "rude": lambda: throw(Rude("out")),
    "raise": lambda: throw(ValueError("no good")),
    "recurse": recurse,
    "flood": flood,
    "close_pipes": lambda: os.closerange(3, 4096),
    "close_standard": close_standard,
    "scribble": scribble,
    "leave_processes": leave_processes,
    "many_threads": many_threads,
    "read_stdin": input,
    "none": lambda: None,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "str": lambda: "1.0",
    "list": lambda: [1.0, 0.0],
    "huge_int": lambda: 10**400,
    "bool": lambda: True,
    "int": lambda: 1,
    "numpy": lambda: np.float32(1.0),
    "score": lambda: Score.ok(1.0, {"format": 0.5}),
    "answer": lambda: Score.ok(1.0, answer="x"),
    "long_x": lambda: Score.ok(1.0, answer="\u00e9" * 1_000_000 + "x"),
    "long_y": lambda: Score.ok(1.0, answer="\u00e9" * 1_000_000 + "y"),
    "answer_list": lambda: Score.ok(1.0, answer=["x"]),  # pyright: ignore[reportArgumentType]
    "score_unknown": lambda: Score.unknown("no verdict"),
    "score_nan": lambda: Score.ok(float("nan")),
    "score_none": lambda: Score(ScoreStatus.OK, None),
    "part_nan": lambda: Score.ok(1.0, {"format": float("nan")}),
    "long_reason": lambda: Score.unknown("x" * 1_000_000),
    "many_parts": lambda: Score.ok(1.0, {f"part {i}": 1.0 for i in range(100_000)}),
}


def reward(prompt, completion):
    return ACTIONS[completion]()


async def async_reward(prompt, completion):
    await asyncio.sleep(0.01)
    return await asyncio.to_thread(ACTIONS[completion])
