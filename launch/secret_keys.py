"""Secrets have no place in a recipe: the run folder and the job list show it to whoever reads them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..engine.errors import Problem

SECRET_KEY = re.compile(
    r"(^|[_-])(api_?key|access_?key|secret(_?key)?|credentials?|passw(or)?d|(access|auth|api|bearer|hf|hub)_?token)$|^token$",
    re.IGNORECASE,
)
SECRET_URL = re.compile(r"^\w+://[^/@\s]*:[^/@\s]+@")
REMEDY = (
    "is not printed: it looks like a secret, and would be written beside the results. Put it into an environment "
    "variable (on a cluster: of its nodes) and name that, as api_key_env does"
)


def secrets_in(value: Any, path: str = "") -> Iterator[Problem]:
    """Keys named like a secret that hold a text or a number, and URLs with a password; the values are not repeated."""
    if isinstance(value, dict):
        for key, inner in value.items():
            place = f"{path}.{key}" if path else str(key)
            if SECRET_KEY.search(str(key)) and isinstance(inner, str | int) and inner:
                yield Problem(place, ..., REMEDY)
            else:
                yield from secrets_in(inner, place)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from secrets_in(inner, f"{path}[{i}]")
    elif isinstance(value, str) and SECRET_URL.match(value):
        yield Problem(path, ..., REMEDY)
