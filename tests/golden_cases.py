"""The reference numbers of tests/golden by name, and whether a changed formula or setting misses them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.launch.golden import check_case

Case = dict[str, Any]


def load(stem: str) -> dict[str, Case]:
    file = Path(__file__).parent / "golden" / f"{stem}.json"
    return {case["name"]: case for case in json.loads(file.read_text())["cases"]}


HYBRID, EXPERT = load("hybrid"), load("expert")
CASES = HYBRID | EXPERT
SELECTION = [name for name, case in EXPERT.items() if "data_selection" in case["config"]]


def case_of(name: str, **config: Any) -> Case:
    """A copy of the case; fields of its config are replaced, those of sections within it one by one."""
    case = copy.deepcopy(CASES[name])
    return {**case, "config": overlaid(case.get("config", {}), config)}


def overlaid(config: Mapping[str, Any], changes: Mapping[str, Any]) -> Case:
    return {**config} | {
        key: overlaid(config[key], value)
        if isinstance(value, Mapping) and isinstance(config.get(key), Mapping)
        else value
        for key, value in changes.items()
    }


def fails(case: str | Case, **config: Any) -> bool:
    """Whether the case is computed, and to another value than the one expected.

    An unknown case or key, a setting that is refused and a value that is not produced are no proof.
    """
    result = check_case(case_of(case, **config) if isinstance(case, str) else case)
    where, _, difference = result.problem.partition(": ")
    return difference.startswith("expected ") and not where.endswith("Error")
