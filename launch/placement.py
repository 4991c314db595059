"""Where the roles of a run live: one reservation of a cluster's resources for learner ranks and rollout workers.

Separate GPUs: one bundle a rank and one a rollout worker, which holds all GPUs of its tensor-parallel group, so that
they lie on one node. Colocated (`rollouts.weight_sync: ipc`): rank i and rollout worker i share a bundle of one GPU.
CPU: bundles reserve no cores, because on one machine learner and rollouts work in turn; they are kept on one node,
where the weights travel through shared memory.

A bundle whose node is lost is reserved anew elsewhere by Ray; an actor that is started in it waits for that.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..engine.errors import ClusterError
from .config import Recipe

NO_CORES = 1e-3
"""CPUs of a bundle that reserves none: Ray has no empty bundles."""
FIRST_SECONDS, TELL_SECONDS = 1.0, 30.0
POLL_SECONDS = 0.5

Options = Mapping[str, Any]
"""Ray options of one actor."""


@dataclass(frozen=True)
class Seats:
    """For each learner rank and each rollout worker, the Ray options that put it where it belongs."""

    ranks: Sequence[Options] = ()
    workers: Sequence[Options] = ()


@dataclass(frozen=True)
class Bundles:
    """What is reserved, and whose it is.

    >>> Bundles([{"GPU": 1}, {"GPU": 2}], ranks=[0], workers=[1], strategy="PACK").needed()
    'GPU 3 (1 x GPU 1, 1 x GPU 2)'
    """

    resources: Sequence[Mapping[str, float]]
    ranks: Sequence[int]
    workers: Sequence[int]
    strategy: str

    def needed(self) -> str:
        """Totals, and the pieces that must each lie on one node."""
        total: dict[str, float] = {}
        for bundle in self.resources:
            for kind, n in bundle.items():
                total[kind] = total.get(kind, 0.0) + n
        pieces = Counter(words(bundle) for bundle in self.resources)
        each = ", ".join(f"{n} x {piece}" for piece, n in pieces.items() if piece)
        return f"{words(total)} ({each})" if each else f"{len(self.resources)} places on one node"


def plan_bundles(recipe: Recipe, *, learner: bool, rollouts: bool) -> Bundles:
    """The reservation of a recipe; one of the roles may live elsewhere already."""
    on_gpu = recipe.rollouts.device == "cuda"
    own = {**recipe.learner.resources}, {**recipe.rollouts.resources}
    num_ranks = recipe.learner.num_workers if learner else 0
    num_workers = recipe.rollouts.num_workers if rollouts else 0
    if recipe.rollouts.gpu_share < 1:
        both = max(num_ranks, num_workers)
        resources = [{"GPU": 1.0, **own[0], **own[1]}] * both
        return Bundles(resources, range(num_ranks), range(num_workers), "PACK")
    of_rank = {"GPU": 1.0} if on_gpu else {"CPU": NO_CORES}
    tensor_parallel = float(recipe.rollouts.tensor_parallel_size)
    of_worker = {"GPU": tensor_parallel} if on_gpu else {"CPU": NO_CORES}
    resources = [{**of_rank, **own[0]}] * num_ranks + [{**of_worker, **own[1]}] * num_workers
    free = on_gpu or any(own)
    return Bundles(
        resources,
        range(num_ranks),
        range(num_ranks, num_ranks + num_workers),
        "PACK" if free else "STRICT_PACK",
    )


@contextmanager
def reserve(
    recipe: Recipe,
    *,
    learner: bool = True,
    rollouts: bool = True,
    tell: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Iterator[Seats]:
    """Hold the resources of a recipe's roles inside; ClusterError after `run.wait_seconds`, saying what is missing."""
    import ray

    bundles = plan_bundles(recipe, learner=learner, rollouts=rollouts)
    group = ray.util.placement_group(
        [{**bundle} for bundle in bundles.resources],
        strategy=bundles.strategy,
    )
    try:
        wait_for(group, bundles, recipe.run.wait_seconds, tell)
        yield assign(group, bundles, recipe)
    finally:
        if ray.is_initialized():
            ray.util.remove_placement_group(group)


def wait_for(group: Any, bundles: Bundles, seconds: float, tell: Callable[[str], None]) -> None:
    """Until the reservation stands; says soon, and each half minute, what it waits for."""
    started = time.monotonic()
    told = FIRST_SECONDS - TELL_SECONDS
    while not group.wait(POLL_SECONDS):
        waited = time.monotonic() - started
        missing = f"waits for {bundles.needed()}; {supply(bundles)}"
        if waited >= seconds:
            raise ClusterError(
                f"the run {missing}, for {waited:.0f} s (run.wait_seconds = {seconds:g}); "
                "add nodes, or lower learner.num_workers, rollouts.num_workers or rollouts.tensor_parallel_size"
            )
        if waited - told >= TELL_SECONDS:
            tell(f"{missing}; waiting {seconds - waited:.0f} s more")
            told = waited


def supply(bundles: Bundles) -> str:
    """What each node has of the resources in question.

    "node 10.0.0.1 has GPU 1 of 8 free; node 10.0.0.2 has GPU 0 of 8 free (2 nodes)"
    """
    import ray
    from ray._private.state import available_resources_per_node

    kinds = sorted({kind for bundle in bundles.resources for kind in bundle} - {"CPU"})
    free = available_resources_per_node()
    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            has, of = free.get(node["NodeID"], {}), node["Resources"]
            here = ", ".join(
                f"{kind} {has.get(kind, 0):g} of {of.get(kind, 0):g} free" for kind in kinds
            )
            nodes.append(f"node {node['NodeManagerAddress']}" + (f" has {here}" if here else ""))
    return "; ".join(f"{text} ({n} nodes)" if n > 1 else text for text, n in Counter(nodes).items())


def assign(group: Any, bundles: Bundles, recipe: Recipe) -> Seats:
    """Ranks of one node get neighbouring numbers, the fullest node first: rings of NCCL then cross nodes least."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    node_of = ray.util.placement_group_table(group)["bundles_to_node_id"]
    check_one_machine(recipe, set(node_of.values()))
    ranks = [bundles.ranks[i] for i in order_ranks([node_of[index] for index in bundles.ranks])]
    # Where a rank and a rollout worker share a bundle they share their number, too.
    shared = [index for index in ranks if index in bundles.workers]
    workers = [*shared, *(index for index in bundles.workers if index not in shared)]

    def seat(index: int) -> Options:
        return {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=index
            )
        }

    return Seats([seat(index) for index in ranks], [seat(index) for index in workers])


def order_ranks(nodes: Sequence[str]) -> list[int]:
    """Places of a list of nodes, so that equal nodes are neighbours.

    >>> order_ranks(["a", "b", "a", "b", "b"])
    [1, 3, 4, 0, 2]
    """
    size = Counter(nodes)
    return sorted(range(len(nodes)), key=lambda i: (-size[nodes[i]], nodes[i], i))


def check_one_machine(recipe: Recipe, node_ids: set[str]) -> None:
    """Shared memory ends at the machine's edge."""
    import ray

    hosts = {n["NodeManagerHostname"] for n in ray.nodes() if n["NodeID"] in node_ids}
    if recipe.rollouts.weight_sync == "shared_memory" and len(hosts) > 1:
        raise ClusterError(
            f"learner and rollouts are placed on {len(hosts)} machines ({', '.join(sorted(hosts))}), but "
            "rollouts.weight_sync = shared_memory works within one; leave out learner.resources and "
            "rollouts.resources, or name resources of one machine"
        )


def words(resources: Mapping[str, float]) -> str:
    """Without the cores that are named only because a bundle cannot be empty.

    >>> words({"GPU": 2.0, "CPU": 0.002})
    'GPU 2'
    """
    return ", ".join(f"{kind} {n:g}" for kind, n in resources.items() if kind != "CPU")
