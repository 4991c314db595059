"""docs/jobs.md and the example clusters: what they say is what is there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from plait.engine import errors
from plait.launch import preflight
from plait.launch.config import validate
from plait.launch.signals import ENDED_AT_ONCE

DOCS = Path(__file__).parents[2] / "docs"
CLUSTERS = DOCS / "clusters"


def test_every_exit_code_is_in_the_table():
    table = re.findall(r"^\| (\d+) \|", (DOCS / "jobs.md").read_text(), re.MULTILINE)
    kinds = [e for e in vars(errors).values() if isinstance(e, type)]
    codes = {e.exit_code for e in kinds if issubclass(e, errors.PlaitError)}
    assert sorted(codes | {0, ENDED_AT_ONCE}) == sorted(map(int, table))


def test_every_error_with_another_remedy_has_another_code():
    kinds = [e for e in vars(errors).values() if isinstance(e, type)]
    own = [e for e in kinds if issubclass(e, errors.PlaitError) and "exit_code" in vars(e)]
    same = {e.exit_code: [k.__name__ for k in own if k.exit_code == e.exit_code] for e in own}
    assert {code: names for code, names in same.items() if len(names) > 1} == {
        2: ["ConfigError", "DataError"]
    }


def test_every_line_of_the_preflight_is_explained():
    source = Path(preflight.__file__).read_text()
    names = set(re.findall(r'Check\(\s*"(\w+)"', source))
    page = (DOCS / "jobs.md").read_text()
    assert names == set(re.findall(r"^\| (\w+) \| .*", page, re.MULTILINE)) & names
    assert len(names) == 7


def test_the_ray_cluster_file_follows_rays_schema():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    config = yaml.safe_load((CLUSTERS / "ray-cluster.yaml").read_text())
    jsonschema.validate(config, schema)
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    for command in starts:
        if "ray start" in command:
            assert "RAY_AUTH_MODE=token" in command
            check_ray_start(command.split("ray start ")[1])


def check_ray_start(arguments: str) -> None:
    """Options that this Ray's `ray start` has."""
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    given = {word.split("=")[0] for word in arguments.split() if word.startswith("--")}
    assert given <= known, given - known


def test_the_kuberay_job():
    """What KubeRay reads: an entrypoint, a job environment, containers with token and mounts."""
    job = yaml.safe_load((CLUSTERS / "kuberay-rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["rayClusterSpec"]["rayVersion"] == ray.__version__
    env = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    cluster = spec["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in pods:
        inner = pod["template"]["spec"]
        assert inner["terminationGracePeriodSeconds"] > int(env["RAY_JOB_STOP_WAIT_TIME_S"])
        (container,) = inner["containers"]
        variables = {one["name"]: one for one in container["env"]}
        assert variables["RAY_AUTH_MODE"]["value"] == "token"
        for secret in ("RAY_AUTH_TOKEN", "HF_TOKEN"):
            assert set(variables[secret]) == {"name", "valueFrom"}, "by reference, never by value"
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in inner["volumes"]}
    groups = cluster["workerGroupSpecs"]
    assert all(g["minReplicas"] <= g["replicas"] <= g["maxReplicas"] for g in groups)


def test_the_slurm_script_ends_where_ray_does_not_start(tmp_path):
    """Slurm, srun and plait are programs that note their call; the head's step ends at once."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "scontrol": "echo node-1",
        "srun": 'case "$*" in *hostname*) echo 10.0.0.1;; *) echo no room >&2; exit 1;; esac',
        "ray": "exit 1",
        "plait": "touch trained",
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    (tools / "activate").touch()
    done = subprocess.run(
        ["bash", str(CLUSTERS / "slurm.sh"), "recipe.yaml"],
        env={
            "PATH": f"{tools}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "PLAIT_VENV": str(tmp_path),
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node-1",
            "SLURM_NNODES": "1",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == errors.ClusterError.exit_code, done.stderr
    assert "no Ray head at 10.0.0.1:20007" in done.stderr
    assert not (tmp_path / "trained").exists()
    assert not list(tmp_path.glob(".ray-token-*"))


def test_the_slurm_script():
    script = CLUSTERS / "slurm.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    text = script.read_text()
    assert errors.Stopped.exit_code == int(re.findall(r'"\$code" -eq (\d+)', text)[0])
    for arguments in re.findall(r"ray start (--block .*?)[\n\"]", text):
        check_ray_start(arguments)


@pytest.mark.parametrize("key", ["run.wait_seconds", "learner.resources", "rollouts.resources"])
def test_keys_of_the_page_exist(key):
    section, name = key.split(".")
    value = 5 if name == "wait_seconds" else {"node": 1}
    recipe = {
        "run": {"name": "x"},
        "model": "m/m",
        "algorithm": {"type": "chord"},
        "data": {"type": "jsonl", "path": "rows.jsonl"},
        "reward": "math",
        "loop": {"steps": 1},
    }
    validate({**recipe, section: {**recipe.get(section, {}), name: value}})
    assert key in (DOCS / "jobs.md").read_text()
