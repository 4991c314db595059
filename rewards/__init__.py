"""Verifiers and reward functions, and the scorer that runs them safely."""

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from .. import __version__ as __version__
from ..engine.errors import ConfigError

if TYPE_CHECKING:
    from ..engine.contracts import RewardFn

REWARDS: "dict[str, str | RewardFn]" = {
    "boxed_math": "plait.rewards.math:grade_boxed_math",
    "exact": "plait.rewards.exact:grade_exact",
    "format": "plait.rewards.format:grade_format",
    "judge": "plait.rewards.judge:grade_judge",
    "json_schema": "plait.rewards.json_schema:grade_json_schema",
    "math": "plait.rewards.math:grade_math",
    "multiple_choice": "plait.rewards.multiple_choice:grade_multiple_choice",
    "numeric": "plait.rewards.numeric:grade_numeric",
    "python_tests": "plait.rewards.python_tests:grade_python_tests",
    "reasoning_gym": "plait.rewards.reasoning_gym:grade_reasoning_gym",
}
"""Built-in rewards: name -> `module:function` (imported on first use) or the function itself."""


OBJECT = "object:"
"""How the name of a function begins that no module holds; only Python code can pass it."""


def object_name(function: "RewardFn") -> str:
    """`module:function` where that is this very function, else `object:name`."""
    name = getattr(function, "__qualname__", type(function).__name__)
    module = getattr(function, "__module__", None) or "__main__"
    found = getattr(sys.modules.get(module), name, None)
    return f"{module}:{name}" if module != "__main__" and found is function else f"{OBJECT}{name}"


def resolve(
    name: str,
    *,
    path: str = "reward.function",
    options: Mapping[str, Any] | None = None,
    function: object = None,
) -> "RewardFn":
    """The reward function of a built-in name or of `module:function`, its keyword `options` filled in.

    A `function` given is taken instead of looking `name` up.

    The current working directory is put at the front of `sys.path` and stays there, so that a folder that
    holds only `rewards.py` and a recipe with `reward: rewards:my_reward` works.

    Raises ConfigError at `path`, the recipe field that holds `name`, when there is no such built-in reward, the
    module is missing or cannot be imported, its attribute is missing or not callable, or it does not take the options.
    """
    found = cast("RewardFn", function) if function is not None else _look_up(name, path)
    if not callable(found):
        raise ConfigError.at(
            path,
            name,
            f"{name.rpartition(':')[2]!r} is {type(found).__name__}, not a function; "
            "name a function (prompt, completion) -> number, Score or None",
        )
    try:
        inspect.signature(found).bind(None, "", **(options or {}))
    except TypeError as error:
        raise ConfigError.at(
            path, name, f"cannot be called with (prompt, completion) and its options: {error}"
        ) from error
    except ValueError:  # a builtin that tells no signature
        pass
    return partial(found, **options) if options else found


def _look_up(name: str, path: str) -> "RewardFn":
    if name.startswith(OBJECT):
        raise ConfigError.at(
            path,
            name,
            "this reward was passed by Python code; pass it again: plait.train(..., reward=function) or "
            "plait.resume(run, reward=function), or move it into a module",
        )
    builtin = REWARDS.get(name)
    if callable(builtin):
        return builtin
    target = builtin or name
    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError.at(path, name, _no_builtin(name))
    module = _import(module_name, name, path)
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, _functions(module), n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "define it there"
        where = getattr(module, "__file__", None) or module_name
        raise ConfigError.at(path, name, f"{where} has no {attribute!r}; {remedy}")
    return getattr(module, attribute)


def _no_builtin(name: str) -> str:
    near = difflib.get_close_matches(name, REWARDS, n=1)
    suggestion = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"no built-in reward has this name; {suggestion}built in are {', '.join(sorted(REWARDS))}; "
        "a function of your own is written module:function"
    )


def _import(module_name: str, name: str, path: str) -> ModuleType:
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise ConfigError.at(
                path,
                name,
                f"no module {missing!r} in {folder} or among the installed packages; "
                "start plait in the folder that holds it, or install it",
            ) from error
        raise ConfigError.at(path, name, _import_failed(module_name, error)) from error
    except Exception as error:  # a user's module may raise anything at import
        raise ConfigError.at(path, name, _import_failed(module_name, error)) from error


def _import_failed(module_name: str, error: Exception) -> str:
    last_line = traceback.format_exception_only(error)[-1].strip()
    return f"importing {module_name} failed: {last_line}; `python -c 'import {module_name}'` shows more"


def _functions(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value)]
