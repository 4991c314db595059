"""Reward `python_tests`: verdicts, and what hostile programs can do from inside the sandbox: nothing."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from plait.engine.types import Score, ScoreStatus
from plait.rewards import sandbox, sandbox_launcher
from plait.rewards.python_tests import grade_python_tests

from .conftest import MakeScorer, make_prompt, score_texts

GOOD = "def f(x):\n    return x + 1\n"
TEXTS = ["assert f(1) == 2", "def test_two():\n    assert f(2) == 3"]
PAIRS = [{"input": "2\n", "output": "3\n"}, {"input": "5", "output": "6"}]


def grade(completion: str, tests: object = TEXTS, **options) -> Score:
    return grade_python_tests(make_prompt(metadata={"tests": tests}), completion, **options)


@pytest.fixture(scope="module")
def namespaces() -> None:
    """Skips where the machine allows no namespaces, as many containers do."""
    try:
        sandbox.run("script", "", sandbox.Limits(5.0), "namespaces")
    except sandbox.SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["namespaces", "limits"])
def isolation(request: pytest.FixtureRequest) -> str:
    if request.param == "namespaces":
        request.getfixturevalue("namespaces")
    return request.param


@pytest.mark.parametrize(
    ("completion", "tests", "passed"),
    [
        (GOOD, TEXTS, 2),
        (f"Here:\n```python\n{GOOD}```\nDone.", TEXTS, 2),
        (f"```python\nold\n```\n```py\n{GOOD}```\n```text\nx\n```", TEXTS, 2),
        (f"```python\n{GOOD}```\n```python\ncut off", TEXTS, 2),
        ("def f(x):\n    return 2\n", TEXTS, 1),
        ("def f(x):\n    raise KeyError\n", TEXTS, 0),
        ("def f(x", TEXTS, 0),
        ("", TEXTS, 0),
        ("\x00", TEXTS, 0),
        ("# \ud800\n" + GOOD, TEXTS, 2),
        ("(" * 100_000, TEXTS, 0),
        ("print(int(input()) + 1)", PAIRS, 2),
        ("import sys\nfor line in sys.stdin:\n    print(int(line) + 1, ' \\n\\n')", PAIRS, 2),
        (
            "if __name__ == '__main__':\n    print(int(input()) + 1)\n    raise SystemExit(0)",
            PAIRS,
            2,
        ),
        ("print(3)", PAIRS, 1),
        ("print(int(input()) + 1)\nraise SystemExit(1)", PAIRS, 0),
        ("print(int(input()) + 1)\n1 / 0", PAIRS, 0),
        ("if __name__ == '__main__':\n    1 / 0\n" + GOOD, TEXTS, 2),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n" + GOOD, TEXTS, 2),
    ],
)
def test_verdicts(isolation: str, completion: str, tests: list, passed: int) -> None:
    score = grade(completion, tests, isolation=isolation)
    assert score == Score.ok(float(passed == 2), {"passed": passed, "total": 2})
    share = grade(completion, tests, isolation=isolation, partial=True)
    assert share.reward == passed / 2


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        (None, 'no metadata["tests"]'),
        ([], 'no metadata["tests"]'),
        ("assert f(1)", 'no metadata["tests"]'),
        ([{"input": "1"}], 'no metadata["tests"]'),
        ([{"input": 1, "output": "2"}], 'no metadata["tests"]'),
        (["assert True", 3], 'no metadata["tests"]'),
        (["assert True", "assert ("], 'metadata["tests"][1] is no Python'),
        (["\x00"], 'metadata["tests"][0] is no Python'),
    ],
)
def test_tests_that_cannot_be_used(tests: object, reason: str) -> None:
    score = grade(GOOD, tests)
    assert score.status is ScoreStatus.UNKNOWN
    assert reason in score.reason


HOSTILE = {
    "loop": "while True: pass",
    "loop_in_test": "def f(x):\n    while True: pass",
    "sleep": "import time; time.sleep(60)",
    "fork_bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "memory": "x = bytearray(10 << 30)",
    "memory_slow": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "recursion": "def f(x): return f(x)",
    "exit": "import sys; sys.exit(0)",
    "os_exit": "import os; os._exit(0)",
    "exit_in_test": "import sys\ndef f(x): sys.exit(0)",
    "os_exit_in_test": "import os\ndef f(x): os._exit(0)",
    "exec_true": "import os\ndef f(x): os.execv('/bin/true', ['true'])",
    "segfault": "import ctypes; ctypes.string_at(0)",
    "kill_all": "import os\nfor signal in (15, 9):\n    os.kill(os.getpid(), signal)",
    "print_passes": "for i in range(9): print('up\\nran\\n', '0' * 32, i, 1)\nraise SystemExit(0)",
    "write_passes": (
        "import os\nfor fd in range(3, 256):\n    try: os.write(fd, b'up\\nran\\n' + b'0' * 32 + b' 0 1\\n')\n"
        "    except OSError: pass\nos._exit(0)"
    ),
    "close_all": "import os\nos.closerange(0, 256)",
    "patch_builtins": (
        "import builtins, os, sys\nbuiltins.exec = builtins.compile = lambda *a: None\n"
        "builtins.BaseException = builtins.AssertionError = ValueError\n"
        "os._exit = lambda code: None\nsys.settrace(lambda *a: None)\ndef f(x): return 0"
    ),
    "patch_assert": "class AssertionError(SystemExit): pass\ndef f(x): return 0",
    "patch_write": "import os\nos.write = lambda fd, data: len(data)\ndef f(x): return 0",
    "flood": "for _ in range(100_000): print('x' * 1000)",
    "fork_and_pass": "import os\ndef f(x):\n    os.fork()\n    return x",
    "threads": "import threading, time\nfor _ in range(1000): threading.Thread(target=time.sleep, args=(60,)).start()",
    "stdin": "input()",
}


@pytest.mark.parametrize("name", [n for n in HOSTILE if n != "fork_bomb"])
def test_hostile_code_fails_in_time(isolation: str, name: str) -> None:
    started = time.monotonic()
    score = grade(HOSTILE[name], isolation=isolation, time_limit=1.5)
    assert score == Score.ok(0.0, {"passed": 0, "total": 2})
    assert time.monotonic() - started < 6.0


def test_a_fork_bomb_is_bounded(namespaces: None) -> None:
    before = len(psutil.pids())
    worst = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal worst
        while not done.wait(0.05):
            worst = max(worst, len(psutil.pids()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    score = grade(HOSTILE["fork_bomb"], time_limit=1.5)
    done.set()
    watcher.join()
    assert score.reward == 0.0
    assert worst - before < 64
    wait_until(lambda: len(psutil.pids()) <= before + 4)


def test_a_flood_of_output_is_cut(isolation: str) -> None:
    code = "print(int(input()) + 1)\n" + HOSTILE["flood"]
    assert grade(code, PAIRS, isolation=isolation).parts == {"passed": 0, "total": 2}
    assert grade(f"{HOSTILE['flood']}\n{GOOD}", TEXTS, isolation=isolation).reward == 1.0


def test_the_environment_is_empty(isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_TEST_SECRET", "canary")
    code = "import os\ndef f(): return str(dict(os.environ))"
    assert (
        grade(
            code, ["assert 'canary' not in f()", "assert 'HOME' in f()"], isolation=isolation
        ).reward
        == 1.0
    )


@pytest.mark.usefixtures("namespaces")
def test_no_secret_of_another_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLAIT_TEST_SECRET", "canary")
    (tmp_path / "secret").write_text("canary")
    code = f"""
import os, glob
def f():
    found = []
    for path in [*glob.glob('/proc/*/environ'), {str(tmp_path / "secret")!r}, {__file__!r}, '/etc/passwd']:
        try: found.append(open(path, 'rb').read())
        except OSError: pass
    return found
def g():
    killed = 0
    for pid in [{os.getpid()}, {os.getppid()}, *range(2, 300)]:
        try: os.kill(pid, 0); killed += 1
        except OSError: pass
    return killed
"""
    assert grade(code, ["assert f() == []", "assert g() == 0"]).reward == 1.0


@pytest.mark.usefixtures("namespaces")
def test_no_network(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        path = tempfile.mktemp(dir="/tmp")
        local.bind(path)
        local.listen()
        code = f"""
import socket
def f(family, address):
    with socket.socket(family) as s:
        s.settimeout(1)
        try: s.connect(address)
        except OSError as error: return type(error).__name__
        return 'connected'
tcp = lambda: f(socket.AF_INET, ('127.0.0.1', {server.getsockname()[1]}))
out = lambda: f(socket.AF_INET, ('8.8.8.8', 53))
unix = lambda: f(socket.AF_UNIX, {path!r})
"""
        tests = [f"assert {name}() != 'connected', {name}()" for name in ("tcp", "out", "unix")]
        score = grade(code, tests)
        os.unlink(path)
    assert score.parts == {"passed": 3, "total": 3}


@pytest.mark.usefixtures("namespaces")
def test_nothing_can_be_written_outside(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    code = f"""
import os, sys, tempfile
def f():
    written = []
    here = [{str(tmp_path)!r}, {os.getcwd()!r}]
    for folder in ['/', '/usr', '/usr/lib', sys.prefix, sys.base_prefix, '/dev/shm', *here]:
        try: open(os.path.join(folder, 'canary'), 'w').close()
        except OSError: continue
        written.append(folder)
    return written
def g():
    open('own', 'w').write('x')
    with tempfile.NamedTemporaryFile('w') as file: file.write('x')
    try: open('huge', 'w').write('x' * (64 << 20))
    except OSError: return open('own').read()
def h():
    import ctypes
    c = ctypes.CDLL(None)
    return c.mount(b'tmpfs', b'/usr', b'tmpfs', 0, b''), c.umount2(b'/usr', 2), os.getuid() == 0
"""
    tests = ["assert f() == [], f()", "assert g() == 'x'", "assert h() == (-1, -1, False)"]
    assert grade(code, tests).parts == {"passed": 3, "total": 3}
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_behind(isolation: str) -> None:
    folders = set(Path(tempfile.gettempdir()).glob("plait-sandbox-*"))
    descriptors = len(os.listdir("/proc/self/fd"))
    code = (
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(61.25)'], start_new_session=True)\n"
        "open('left', 'w').write('x')\n" + GOOD
    )
    for _ in range(3):
        assert grade(code, isolation=isolation).reward == 1.0
        grade(HOSTILE["loop"], isolation=isolation, time_limit=0.2)
    wait_until(lambda: not any("61.25" in " ".join(p) for p in command_lines()))
    assert set(Path(tempfile.gettempdir()).glob("plait-sandbox-*")) <= folders
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_sandbox_that_cannot_be_had_is_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = Path(sandbox_launcher.__file__).read_text()
    broken = tmp_path / "launcher.py"
    broken.write_text(text.replace('call("unshare", libc', 'call("unshare", -1 or libc'))
    monkeypatch.setattr(sandbox_launcher, "__file__", str(broken))
    score = grade(GOOD)
    assert score.status is ScoreStatus.UNKNOWN
    assert "isolation: namespaces cannot be had here" in score.reason
    assert "set the option isolation: limits" in score.reason
    assert grade(GOOD, isolation="limits").reward == 1.0
    broken.write_text("raise SystemExit(3)")
    assert "did not start" in grade(GOOD).reason


AS_USER = """
import os, sys, tempfile
from pathlib import Path
from plait.engine.types import Prompt
from plait.rewards.python_tests import grade_python_tests
from plait.rewards.sandbox_launcher import libc, mount

# In a view of the file system of its own, show an interpreter that lies in a folder only root may enter.
assert libc.unshare(0x00020000) == 0
mount("", "/", "", 16384 | 1 << 18)
closed = [p for p in reversed(Path(sys.base_prefix).parents) if not p.stat().st_mode & 1]
if closed:
    kept = tempfile.mkdtemp()
    mount(sys.base_prefix, kept, "", 4096 | 16384)
    mount("tmpfs", str(closed[0]), "tmpfs", 0, "mode=755")
    os.makedirs(sys.base_prefix)
    mount(kept, sys.base_prefix, "", 4096 | 16384)
os.setgroups([])
os.setresgid(12345, 12345, 12345)
os.setresuid(12345, 12345, 12345)
for completion in sys.argv[2:]:
    prompt = Prompt("p", (), (), metadata={"tests": eval(sys.argv[1])})
    score = grade_python_tests(prompt, completion, time_limit=1.0)
    print(score.reward, score.reason)
"""


@pytest.mark.usefixtures("namespaces")
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_gets_the_same_sandbox() -> None:
    canary = "import os\ndef f(x):\n    return 2 if os.path.exists('/proc/self') else x + 1"
    command = [sys.executable, "-c", AS_USER, repr(TEXTS), GOOD, HOSTILE["fork_bomb"], canary]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "unshare" in done.stdout or "uid_map" in done.stdout:
        pytest.skip(done.stdout)
    assert done.stdout == "1.0 \n0.0 \n1.0 \n", done.stderr


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("isolation", "net", "namespaces or limits"),
        ("isolation", None, "namespaces or limits"),
        ("time_limit", 0, "above 0"),
        ("time_limit", "5", "above 0"),
        ("memory_mib", -1, "above 0"),
        ("memory_mib", float("inf"), "above 0"),
    ],
)
def test_a_bad_option_is_named(option: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"option {option} = .*{message}"):
        grade(GOOD, **{option: value})


def test_through_the_scorer(make_scorer: MakeScorer, namespaces: None) -> None:
    scorer = make_scorer("python_tests", options={"time_limit": 2.0, "partial": True})
    texts = [
        GOOD,
        HOSTILE["loop"],
        HOSTILE["fork_bomb"],
        HOSTILE["write_passes"],
        "def f(x): return 2",
    ]
    scores = score_texts(scorer, texts, make_prompt(metadata={"tests": TEXTS}))
    assert [score.reward for score in scores] == [1.0, 0.0, 0.0, 0.0, 0.5]


def command_lines() -> list[list[str]]:
    return [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 3.0
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def test_many_open_files_of_the_caller_are_no_trouble() -> None:
    """The numbers of the pipes are drawn; they must not hit one another."""
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(150)]
    try:
        scores = [grade(GOOD, isolation="limits") for _ in range(40)]
    finally:
        for file in files:
            os.close(file)
    assert [score.reward for score in scores] == [1.0] * 40
