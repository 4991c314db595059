"""Reservations of every layout, on clusters of several nodes whose GPUs are only claimed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from end_to_end.command_line import tiny_recipe
from plait.launch.config import Recipe, validate
from plait.launch.placement import order_ranks, plan_bundles


def recipe_of(learner: dict, rollouts: dict, wait_seconds: float = 2.0) -> Recipe:
    raw = tiny_recipe("models/tiny", learner=learner, rollouts=rollouts)  # pyright: ignore[reportArgumentType]
    return validate({**raw, "run": {"name": "placed", "wait_seconds": wait_seconds}})


def gpu_recipe(ranks: int, workers: int, wait_seconds: float = 2.0, **rollouts) -> Recipe:
    return recipe_of(
        {"num_workers": ranks, "device": "cuda"},
        {"num_workers": workers, "device": "cuda", "weight_sync": "nccl", **rollouts},
        wait_seconds,
    )


def bundles_of(recipe: Recipe, *, learner: bool = True, rollouts: bool = True):
    return plan_bundles(recipe, learner=learner, rollouts=rollouts)


def test_separate_gpus_get_a_bundle_each_and_a_tensor_parallel_group_one_of_its_size():
    found = bundles_of(gpu_recipe(2, 2, tensor_parallel_size=4))
    assert found.resources == [{"GPU": 1.0}] * 2 + [{"GPU": 4.0}] * 2
    assert (list(found.ranks), list(found.workers)) == ([0, 1], [2, 3])
    assert found.needed() == "GPU 10 (2 x GPU 1, 2 x GPU 4)"


def test_colocated_roles_share_bundles():
    found = bundles_of(gpu_recipe(2, 2, weight_sync="ipc"))
    assert found.resources == [{"GPU": 1.0}] * 2
    assert list(found.ranks) == list(found.workers) == [0, 1]


def test_cpu_roles_reserve_no_cores_and_stay_on_one_machine():
    found = bundles_of(recipe_of({"num_workers": 2}, {"num_workers": 2}))
    assert found.strategy == "STRICT_PACK"
    assert sum(bundle["CPU"] for bundle in found.resources) < 0.01


def test_one_role_alone():
    recipe = gpu_recipe(2, 1)
    assert list(bundles_of(recipe, rollouts=False).workers) == []
    assert list(bundles_of(recipe, learner=False).ranks) == []
    assert list(bundles_of(recipe, learner=False).workers) == [0]


@pytest.mark.parametrize("nodes", ["", "a", "abab", "cabbac", "aabbb"])
def test_ranks_of_one_node_are_neighbours(nodes):
    """One run of equal nodes for each node, the fullest first, none lost."""
    order = order_ranks(nodes)
    assert sorted(order) == list(range(len(nodes)))
    runs = re.findall(r"(.)\1*", "".join(nodes[i] for i in order))
    assert sorted(runs) == sorted(set(nodes))
    sizes = [nodes.count(node) for node in runs]
    assert sizes == sorted(sizes, reverse=True)


def test_placement_on_a_cluster_of_three_nodes():
    """In a process of its own: this one may be in another cluster already."""
    script = Path(__file__).with_name("place_on_cluster.py")
    path = os.pathsep.join([str(script.parents[2] / "src"), str(script.parents[1])])
    environ = {**os.environ, "PYTHONPATH": path, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, script], env=environ, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "placed" in done.stdout
