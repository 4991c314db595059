"""F38: a recipe with something wrong is refused before any worker starts, and the message names the field."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from invalid_recipes import mutations

from end_to_end.command_line import plait_command, tiny_recipe
from plait.launch import cli, cluster

COUNT, MOST_SECONDS = 100, 3.0


@pytest.fixture
def right(tmp_path, tiny_model) -> dict:
    """A recipe that is refused for no reason."""
    (tmp_path / "data.jsonl").write_text('{"prompt": "1 + 1?", "answer": "2"}\n' * 8)
    recipe = tiny_recipe(tiny_model, run={"name": "broken", "dir": str(tmp_path / "runs")})
    return {**recipe, "reward": {"function": "exact"}}


def test_f38_a_hundred_invalid_recipes(right, tmp_path, monkeypatch, capsys, measured):
    """Through the command line's own entry point, in this process."""
    started: list[str] = []
    monkeypatch.setattr(cluster, "ray_cluster", lambda: started.append("ray"))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipe.yaml"
    monkeypatch.setattr(sys, "argv", ["plait", "train", str(file)])
    slowest, escaped = 0.0, []
    cases = mutations(right, COUNT)
    assert len({case.name + str(case.recipe) for case in cases}) == COUNT
    for case in cases:
        file.write_text(yaml.safe_dump(case.recipe))
        begun = time.monotonic()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        slowest = max(slowest, time.monotonic() - begun)
        said = capsys.readouterr().err
        if ended.value.code != 2 or case.key not in said:
            escaped.append((case.name, ended.value.code, said))
    assert escaped == []
    assert started == []
    assert not (tmp_path / "runs").exists()
    assert slowest <= MOST_SECONDS
    measured("F38", f"caught {COUNT}/{COUNT}, the field named in each, at most {slowest:.2f} s")


def test_f38_as_a_person_meets_it(right, tmp_path, measured):
    """A few as processes of their own, start of the interpreter included."""
    slowest = 0.0
    for case in mutations(right, COUNT)[:: COUNT // 4]:
        Path(tmp_path / "recipe.yaml").write_text(yaml.safe_dump(case.recipe))
        begun = time.monotonic()
        done = subprocess.run(
            plait_command("train", "recipe.yaml"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        slowest = max(slowest, time.monotonic() - begun)
        assert done.returncode == 2, case.name + done.stderr
        assert case.key in done.stderr
        assert "Traceback" not in done.stderr
    measured("F38", f"as a process: at most {slowest:.1f} s")
