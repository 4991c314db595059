"""Where Ray really starts the roles: a cluster of three nodes whose GPUs are only claimed. Run by test_placement.py."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from launch.test_placement import gpu_recipe, recipe_of
from plait.engine.errors import ClusterError
from plait.launch.placement import order_ranks, reserve


def main() -> None:
    """Nodes of two and four claimed GPUs, and one without any, which alone has the resource `disk`."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 2})
    try:
        cluster.add_node(num_cpus=1, num_gpus=4)
        cluster.add_node(num_cpus=1, resources={"disk": 2})
        ray.init(address=cluster.address, log_to_driver=False)
        roles_on_gpus()
        a_resource_steers_a_role()
        print("placed")
    finally:
        ray.shutdown()
        cluster.shutdown()


def node_of(options: Any) -> str:
    @ray.remote(num_cpus=0)
    class Probe:
        def where(self) -> str:
            return ray.get_runtime_context().get_node_id()

    probe: Any = Probe
    return ray.get(probe.options(**options).remote().where.remote(), timeout=60)


def roles_on_gpus() -> None:
    """What is held is free again afterwards; what is missing is said at once, and ends the wait."""
    with reserve(gpu_recipe(2, 1, tensor_parallel_size=4)) as seats:
        ranks = [node_of(seat) for seat in seats.ranks]
        assert len(set(ranks)) == 1
        assert node_of(seats.workers[0]) != ranks[0]

        told: list[str] = []
        started = time.monotonic()
        with pytest.raises(ClusterError) as caught, reserve(gpu_recipe(1, 1), tell=told.append):
            pass
        assert time.monotonic() - started < 6
        message = str(caught.value)
        assert "waits for GPU 2 (2 x GPU 1)" in message
        assert "GPU 0 of 2 free" in message, message
        assert "GPU 0 of 4 free" in message, message
        assert "run.wait_seconds = 2" in message
        assert len(told) == 1, "told at once, and not again within half a minute"
    with reserve(gpu_recipe(3, 3, wait_seconds=20)) as seats:
        ranks = [node_of(seat) for seat in seats.ranks]
        assert ranks == [ranks[i] for i in order_ranks(ranks)]
    with reserve(gpu_recipe(2, 2, wait_seconds=20, weight_sync="ipc")) as seats:
        assert [*map(node_of, seats.ranks)] == [*map(node_of, seats.workers)]


def a_resource_steers_a_role() -> None:
    disk = next(node["NodeID"] for node in ray.nodes() if "disk" in node["Resources"])
    recipe = recipe_of({"num_workers": 2}, {"resources": {"disk": 1}}, wait_seconds=20)
    with reserve(recipe) as seats:
        assert node_of(seats.workers[0]) == disk
    scarce = recipe_of({}, {"num_workers": 3, "resources": {"disk": 1}})
    with pytest.raises(ClusterError) as caught, reserve(scarce):
        pass
    assert re.search(r"waits for disk 3 \(.*3 x disk 1\).*disk 2 of 2 free", str(caught.value)), (
        caught
    )


main()
