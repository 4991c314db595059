"""Reward `python_tests`: the share of the prompt's tests that the completion's program passes, or all of them or none.

The program is the last closed Markdown block fenced as ```python (or ```py, ```python3), else the whole completion.
`prompt.metadata["tests"]` holds either kind:

    ["assert add(2, 2) == 4", ...]
        Python texts. The program is run as a module named `solution`, then each text in its namespace, in order;
        functions that a text defines with a name starting with `test` are called. It passes when nothing is raised.
    [{"input": "2 2\\n", "output": "4\\n"}, ...]
        The program is run as `__main__`, once for each pair, with `input` on standard input. It passes when it exits
        with 0 and what it printed is `output`, white space at line ends and the end of the text apart.

Where it runs: sandbox.py. Options: `isolation` as it says there; `time_limit` is the seconds that all tests of a
completion share (the reward's own deadline, reward.timeout_seconds, must be longer), `memory_mib` the address space
of a process; `partial` gives the share of tests passed instead of all or nothing. `parts`: {"passed": ..., "total":
...}.

What a program does to itself is its own failure, 0: a syntax error, an exit, a crash, a deadline, too much memory or
output. UNKNOWN is a sandbox that cannot be had, and tests that are missing or are no Python.

Cheating. Pairs: nothing of the expected output enters the sandbox. Texts: a passed test is reported with a random
token that enters the sandbox after the program's own code has run, through a pipe of its own; printing, exiting early
and replaced builtins gain nothing. But a text and the program share an interpreter: one that knows this harness and
searches the frames of its callers, or returns objects that equal everything, passes. Prefer pairs where that matters.
"""

import ast
import time
from collections.abc import Mapping
from typing import Any

from ..engine.types import Prompt, Score
from .answers import last_block
from .sandbox import Isolation, Limits, SandboxError, run

Pair = tuple[str, str]
_SPARE_OUTPUT_BYTES = 1 << 16


def grade_python_tests(
    prompt: Prompt,
    completion: str,
    *,
    partial: bool = False,
    time_limit: float = 6.0,
    memory_mib: int = 512,
    isolation: Isolation = "namespaces",
) -> Score:
    """Share of tests passed, or 1.0 or 0.0. ValueError where an option cannot be used."""
    if isolation not in ("namespaces", "limits"):
        raise ValueError(f"option isolation = {isolation!r}: namespaces or limits")
    for name, value in (("time_limit", time_limit), ("memory_mib", memory_mib)):
        if not isinstance(value, int | float) or not 0 < value < 1 << 30:
            raise ValueError(f"option {name} = {value!r}: a number above 0 is needed")
    limits = Limits(time_limit, int(memory_mib))
    block = last_block(completion, {"python", "py", "python3"})
    code = completion if block is None else block
    try:
        pairs, texts = _read(prompt.metadata.get("tests"))
        passed = (
            _count_pairs(code, pairs, limits, isolation)
            if pairs
            else _count_texts(code, texts, limits, isolation)
        )
    except (SandboxError, _BadTests) as error:
        return Score.unknown(str(error))
    total = len(pairs) + len(texts)
    reward = passed / total if partial else passed == total
    return Score.ok(reward, {"passed": passed, "total": total})


class _BadTests(Exception):
    """metadata["tests"] cannot be used."""


def _read(tests: object) -> tuple[list[Pair], tuple[str, ...]]:
    """The tests as pairs or as texts; one of the two is empty. Raises _BadTests."""
    items: list[Any] = list(tests) if isinstance(tests, list | tuple) else []
    pairs: list[Any] = [(t.get("input"), t.get("output")) for t in items if isinstance(t, Mapping)]
    if items and len(pairs) == len(items):
        if all(isinstance(text, str) for pair in pairs for text in pair):
            return pairs, ()
    elif items and all(isinstance(text, str) for text in items):
        for i, text in enumerate(items):
            _check_python(i, text)
        return [], tuple(items)
    raise _BadTests(
        'the prompt has no metadata["tests"] that is a list of Python texts, or of {"input", "output"} texts'
    )


def _check_python(index: int, text: str) -> None:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _BadTests(f'metadata["tests"][{index}] is no Python: {error}') from error


def _count_texts(code: str, tests: tuple[str, ...], limits: Limits, isolation: Isolation) -> int:
    outcome = run("module", code, limits, isolation, tests=tests)
    if outcome.stopped == "replies":
        return 0
    said: dict[bytes, set[bytes]] = {}
    for reply in outcome.replies:
        index, _, passed = reply.partition(b" ")
        said.setdefault(index, set()).add(passed)
    # A process that was forked on the way reports as well: only an undisputed pass counts.
    return sum(said.get(str(i).encode()) == {b"1"} for i in range(len(tests)))


def _count_pairs(code: str, pairs: list[Pair], limits: Limits, isolation: Isolation) -> int:
    passed, left = 0, limits.seconds
    for given, expected in pairs:
        started = time.monotonic()
        output_bytes = 2 * len(expected.encode("utf-8", "replace")) + _SPARE_OUTPUT_BYTES
        own = Limits(left, limits.memory_mib, output_bytes)
        stdin = given.encode("utf-8", "replace")
        outcome = run("script", code, own, isolation, stdin=stdin)
        if outcome.exit_code == 0:
            passed += _lines(outcome.output.decode(errors="replace")) == _lines(expected)
        left -= time.monotonic() - started
        if left <= 0:
            break
    return passed


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
