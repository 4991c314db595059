"""Whatever a reward function does costs its own sample and nothing else."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from plait.engine.types import ScoreStatus
from plait.rewards.config import RewardConfig
from plait.rewards.scorer import ProcessScorer

from .conftest import score_texts

TIMEOUT = 1.0
ROWS = {
    "F21": ("loop", "regex", "sleep", "big_power", "stop"),
    "F22": ("alloc", "fork_bomb", "segfault", "sys_exit", "os_exit", "rude", "close_pipes"),
    "F24": ("none", "nan", "inf", "str", "list", "score_nan", "score_none", "part_nan"),
}
"""Of the catalogue of faults."""


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessScorer]:
    folder = tmp_path_factory.mktemp("hostile")
    source = Path(__file__).with_name("hostile.py").read_text()
    (folder / "hostile_rewards.py").write_text(source)
    config = RewardConfig(
        function="hostile_rewards:reward",
        timeout_seconds=TIMEOUT,
        max_memory_mib=256,
        max_unknown_fraction=1.0,
    )
    with ProcessScorer(config, str(folder)) as scorer:
        yield scorer


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("loop", "deadline of 1 s exceeded"),
        ("regex", "deadline of 1 s exceeded"),
        ("sleep", "deadline of 1 s exceeded"),
        ("big_power", "deadline of 1 s exceeded"),
        ("stop", "deadline of 1 s exceeded"),
        ("alloc", "MemoryError"),
        ("fork_bomb", "started more than 64 processes"),
        ("segfault", "killed by SIGSEGV"),
        ("sys_exit", "SystemExit: 3"),
        ("os_exit", "ended with exit code 3"),
        ("interrupt", "KeyboardInterrupt"),
        ("rude", "Rude: out (hostile_rewards.py:"),
        ("raise", "ValueError: no good (hostile_rewards.py:"),
        ("recurse", "RecursionError"),
        ("close_pipes", "Bad file descriptor"),
        ("scribble", "wrote into the pipe of replies"),
        ("read_stdin", "EOFError"),
        ("none", "returned None"),
        ("nan", "returned nan"),
        ("inf", "returned inf"),
        ("str", "returned str '1.0', not a number"),
        ("list", "returned list [1.0, 0.0], not a number"),
        ("huge_int", "OverflowError"),
        ("score_unknown", "no verdict"),
        ("score_nan", "returned nan inside a Score"),
        ("score_none", "returned None inside a Score"),
        ("part_nan", "part 'format' of the Score is nan"),
        ("long_reason", "x" * 500),
        ("many_parts", "bytes, more than 65536"),
        ("answer_list", "the answer of the Score is ['x'], not text"),
    ],
)
def test_only_the_hostile_sample_is_unknown(
    scorer: ProcessScorer, action: str, reason: str, measured: Callable[[str, str], None]
) -> None:
    started = time.monotonic()
    scores = score_texts(scorer, ["fine", action, "fine", "fine", "fine"])
    assert time.monotonic() - started < TIMEOUT + 2.0
    assert scores[1].status is ScoreStatus.UNKNOWN
    assert scores[1].reward is None
    assert reason in scores[1].reason
    assert [score.reward for i, score in enumerate(scores) if i != 1] == [1.0] * 4
    for row in (row for row, actions in ROWS.items() if action in actions):
        measured(row, f"{len(ROWS[row])} of {len(ROWS[row])} kinds cost their own sample alone")


@pytest.mark.parametrize(
    "action",
    ["bool", "int", "numpy", "score", "flood", "close_standard", "fork_and_return", "many_threads"],
)
def test_odd_but_valid_returns_pass(scorer: ProcessScorer, action: str) -> None:
    scores = score_texts(scorer, ["fine", action, "fine"])
    assert [score.reward for score in scores] == [1.0] * 3
    assert scores[1].parts == ({"format": 0.5} if action == "score" else {})
    assert all(score.answer is None for score in scores)


def test_answers_come_back_and_long_ones_stay_different(scorer: ProcessScorer) -> None:
    short, one, other, again = score_texts(scorer, ["answer", "long_x", "long_y", "long_x"])
    assert short.answer == "x"
    assert one.answer == again.answer != other.answer
    assert one.answer is not None
    assert len(one.answer) == 500


def test_a_mixture_keeps_every_healthy_sample_and_the_pool(scorer: ProcessScorer) -> None:
    hostile = ["segfault", "os_exit", "alloc", "scribble", "close_pipes", "rude", "loop"]
    texts = [text for action in hostile for text in (action, "fine", "fine", "fine")]
    scores = score_texts(scorer, texts)
    for text, score in zip(texts, scores, strict=True):
        assert score.reward == (1.0 if text == "fine" else None), score
    scores = score_texts(scorer, ["fine"] * 50)
    assert all(score.reward == 1.0 for score in scores)


def test_async_functions(scorer: ProcessScorer, tmp_path: Path) -> None:
    config = RewardConfig(
        function="tests_hostile:async_reward", timeout_seconds=TIMEOUT, max_unknown_fraction=1.0
    )
    source = Path(__file__).with_name("hostile.py").read_text()
    (tmp_path / "tests_hostile.py").write_text(source)
    with ProcessScorer(config, str(tmp_path)) as own:
        scores = score_texts(own, ["fine", "sleep", "raise", "fine", "none"])
    assert [score.reward for score in scores] == [1.0, None, None, 1.0, None]
    assert "deadline" in scores[1].reason
    assert "ValueError: no good" in scores[2].reason


def test_close_leaves_no_process_within_a_second(tmp_path: Path) -> None:
    source = Path(__file__).with_name("hostile.py").read_text()
    (tmp_path / "hostile_closing.py").write_text(source)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    scorer = ProcessScorer(RewardConfig(function="hostile_closing:reward"), str(tmp_path))
    score_texts(scorer, ["leave_processes", "leave_processes", "fine"])
    started = time.monotonic()
    scorer.close()
    scorer.close()
    assert time.monotonic() - started < 1.0
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    left = [int(pid) for pid in (tmp_path / "left_behind.txt").read_text().split()]
    assert len(left) == 4
    assert not any(is_running(pid) for pid in left)


def test_memory_stays_under_the_limit(tmp_path: Path, scorer: ProcessScorer) -> None:
    (tmp_path / "greedy.py").write_text(
        "def reward(prompt, completion):\n"
        "    held = []\n"
        "    try:\n"
        "        while len(held) < 2000:\n"
        "            held.append(bytearray(1 << 20))\n"
        "    except MemoryError:\n"
        "        pass\n"
        "    return len(held)\n"
    )
    config = RewardConfig(function="greedy:reward", max_memory_mib=128)
    with ProcessScorer(config, str(tmp_path)) as own:
        (score,) = score_texts(own, ["x"])
    assert score.reward is not None
    assert 64 <= score.reward <= 128


def test_file_descriptors_do_not_leak(scorer: ProcessScorer) -> None:
    score_texts(scorer, ["fine", "os_exit", "fine"])
    time.sleep(0.3)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        score_texts(scorer, ["os_exit", "fine", "fine"])
    time.sleep(0.3)
    assert abs(len(os.listdir("/proc/self/fd")) - before) <= 5  # a process may just be starting
