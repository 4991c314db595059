"""What the layout promises: layers, light imports, one package in the wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("engine", "rollouts", "rewards", "algorithms", "launch")
HEAVY = ("torch.distributed", "ray", "vllm", "deepspeed", "transformers")


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "module", ["plait.algorithms", "plait.rewards", "plait.engine.types", "plait.engine.contracts"]
)
def test_a_loss_or_a_reward_can_be_checked_without_the_heavy_stack(module, tmp_path):
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = run_python(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_stray_import_of_a_folder_fails_loudly(folder):
    done = run_python(f"import {folder}", ROOT)
    assert done.returncode != 0
    assert "beyond top-level package" in done.stderr


def test_layers_hold():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_link_folder_holds_nothing_else():
    package = ROOT / "src" / "plait"
    assert sorted(p.name for p in package.iterdir() if p.name != "__pycache__") == sorted(
        [*FOLDERS, "__init__.py", "py.typed"]
    )
    for folder in FOLDERS:
        link = package / folder
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder


def test_the_wheel_holds_only_plait(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("plait-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "plait",
        f"{wheel.name.split('-py3')[0]}.dist-info",
    }
    for needed in (
        "plait/engine/loop.py",
        "plait/launch/recipes/quickstart.yaml",
        "plait/launch/recipes/paper/chord.yaml",
        "plait/py.typed",
    ):
        assert needed in names


def test_no_file_grows_a_tail():
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 450
    }
    assert not long
