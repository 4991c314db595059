"""Finding reward functions by name, and saying why one is not found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plait import rewards
from plait.engine.errors import ConfigError
from plait.rewards import REWARDS, resolve


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_built_in_names(name: str) -> None:
    needed = {"judge": {"base_url": "http://127.0.0.1/v1", "model": "m"}}
    assert callable(resolve(name, options=needed.get(name)))


def test_a_needed_option_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"reward\.function = 'judge': .*'base_url'"):
        resolve("judge")


def test_a_function_in_the_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(prompt, completion):
        return 1.0

    monkeypatch.setitem(REWARDS, "own", own)
    assert resolve("own") is own


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "maths",
            "no built-in reward has this name; did you mean 'math'? built in are boxed_math, exact, format",
        ),
        ("quux", "no built-in reward has this name; built in are boxed_math, exact, format"),
        ("", "no built-in reward has this name"),
        (":f", "no built-in reward has this name"),
        ("json:", "no built-in reward has this name"),
        ("no_such_module:f", "no module 'no_such_module' in"),
        ("json.no_such:f", "no module 'json.no_such'"),
        ("json:dump_s", "has no 'dump_s'; did you mean 'dumps'?"),
        ("json:zzz", "has no 'zzz'; define it there"),
        ("json:__name__", "'__name__' is str, not a function"),
    ],
)
def test_what_is_wrong_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(name)
    assert str(caught.value).startswith(f"reward.function = {name!r}: ")
    assert message in str(caught.value)


def test_the_field_can_be_another() -> None:
    with pytest.raises(ConfigError, match=r"^prompt\.reward = 'x'"):
        resolve("x", path="prompt.reward")


def run_in(folder: Path, code: str) -> str:
    """Standard output of `code` in a fresh interpreter that was started in `folder`."""
    source = str(Path(rewards.__file__).parents[2])
    code = f"import sys; sys.path.append({source!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SHOW = """
from plait.rewards import resolve
try:
    print(resolve("rewards:my_reward")(None, ""))
except ValueError as error:
    print(error)
"""


def test_a_users_folder_with_its_own_rewards_module(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("def my_reward(prompt, completion): return 0.5")
    assert run_in(tmp_path, SHOW) == "0.5\n"


def test_a_module_that_fails_is_not_called_missing(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("import no_such_library")
    said = run_in(tmp_path, SHOW)
    assert (
        "importing rewards failed: ModuleNotFoundError: No module named 'no_such_library'" in said
    )
    (tmp_path / "rewards.py").write_text("1 / 0")
    assert "importing rewards failed: ZeroDivisionError" in run_in(tmp_path, SHOW)


def test_the_package_folder_itself_is_not_taken_for_a_users_module() -> None:
    root = Path(os.path.realpath(rewards.__file__)).parents[1]
    assert "importing rewards failed: ImportError: attempted relative import" in run_in(root, SHOW)


def test_importing_is_light(tmp_path: Path) -> None:
    code = (
        "import json, plait.rewards, plait.rewards.scorer; print(json.dumps(sorted(sys.modules)))"
    )
    loaded = set(json.loads(run_in(tmp_path, code)))
    heavy = {"math_verify", "sympy", "reasoning_gym", "torch", "ray", "vllm", "transformers"}
    assert not loaded & heavy
