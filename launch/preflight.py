"""`plait preflight`: on every node of the cluster, what a run needs, before anything of it starts.

Versions and imports, the shared run folder (a word written on one node is read on the others), the model, free ports
between the nodes, GPUs for the recipe; and the reward, where it will run: on the driver's node.
"""

from __future__ import annotations

import platform
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from ..engine.errors import ClusterError, PlaitError
from .check_reward import CHECKED, sample
from .cluster import python_path
from .config import Recipe
from .model import check_model, resolve_model
from .placement import plan_bundles, words
from .run import Inputs, check_inputs, package_versions
from .scoring import open_scorer

IMPORTS = ("torch", "deepspeed", "vllm", "transformers")
NODE_SECONDS = 180.0
CONNECT_SECONDS = 3.0


@dataclass(frozen=True)
class Check:
    """One line of the table. `problem` is empty where all is well."""

    name: str
    found: str
    problem: str = ""

    def __str__(self) -> str:
        verdict = f"REFUSED: {self.problem}" if self.problem else "ok"
        return f"{self.name:<10} {verdict:<4} {self.found}".rstrip()


@dataclass(frozen=True)
class NodeReport:
    """What one node says of itself."""

    address: str
    versions: Mapping[str, str] = field(default_factory=dict)
    failed_imports: Mapping[str, str] = field(default_factory=dict)
    folder_problem: str = ""
    model_problem: str = ""


class NodeProbe:
    """An actor on one node."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.listener = socket.create_server((address, 0))

    def port(self) -> int:
        return self.listener.getsockname()[1]

    def unreachable(self, others: Sequence[tuple[str, int]]) -> list[str]:
        """Nodes whose open port this one cannot connect to."""
        failed = []
        for address, port in others:
            try:
                socket.create_connection((address, port), CONNECT_SECONDS).close()
            except OSError as error:
                failed.append(f"{address} ({error})")
        return failed

    def report(self, folder: str, word: str, model_path: str) -> NodeReport:
        failed: dict[str, str] = {}
        for name in IMPORTS:
            try:
                import_module(name)
            except (ImportError, OSError, RuntimeError) as error:
                failed[name] = f"{type(error).__name__}: {error}"
        versions = {"python": platform.python_version(), **package_versions()}
        folder_problem = model_problem = ""
        try:
            if (Path(folder) / word).read_text() != word:
                folder_problem = "holds another file than the driver's node wrote"
            (Path(folder) / f"{word}-{secrets.token_hex(4)}").write_text(word)
        except OSError as error:
            folder_problem = f"{error.strerror} ({error.filename})"
        try:
            check_model(model_path)
        except PlaitError as error:
            model_problem = str(error)
        return NodeReport(self.address, versions, failed, folder_problem, model_problem)


def preflight(recipe: Recipe) -> list[Check]:
    """Every check of the table; Ray is up. Raises ConfigError and DataError as a run would."""
    inputs = check_inputs(recipe)
    return [*check_nodes(recipe), check_supply(recipe), check_reward(inputs)]


def check_nodes(recipe: Recipe) -> Iterator[Check]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    folder, word = recipe.folder.resolve(), f".preflight-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / word).write_text(word)
    except OSError as error:
        yield Check(
            "folder", str(folder), f"the driver's node cannot write there: {error.strerror}"
        )
        return
    actor: Any = ray.remote(NodeProbe)
    probes = [
        actor.options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            runtime_env={"env_vars": {"PYTHONPATH": python_path()}},
        ).remote(node["NodeManagerAddress"])
        for node in nodes
    ]
    addresses = [node["NodeManagerAddress"] for node in nodes]
    try:
        yield from judge(recipe, addresses, probes, folder, word)
    finally:
        for probe in probes:
            ray.kill(probe)
        for left in folder.glob(f"{word}*"):
            left.unlink()


def answers(addresses: Sequence[str], calls: Sequence[Any]) -> list[Any]:
    """Of all nodes. Raises ClusterError naming the first one that has none within NODE_SECONDS."""
    import ray
    from ray.exceptions import RayError

    deadline, found = time.monotonic() + NODE_SECONDS, []
    for address, call in zip(addresses, calls, strict=True):
        try:
            found.append(ray.get(call, timeout=max(0.0, deadline - time.monotonic())))
        except RayError as error:
            raise ClusterError(
                f"node {address} did not finish the preflight within {NODE_SECONDS:g} s: "
                f"{(str(error).splitlines() or [''])[0]}; mend it, or take it out of the cluster"
            ) from error
    return found


def judge(
    recipe: Recipe, addresses: Sequence[str], probes: Sequence[Any], folder: Path, word: str
) -> Iterator[Check]:
    model = resolve_model(recipe.model.path)  # what the run gives its workers
    calls = [probe.report.remote(str(folder), word, model) for probe in probes]
    reports: list[NodeReport] = answers(addresses, calls)
    ports = answers(addresses, [probe.port.remote() for probe in probes])
    places = list(zip(addresses, ports, strict=True))
    cut_off = answers(addresses, [probe.unreachable.remote(places) for probe in probes])

    def faults(texts: Sequence[str]) -> str:
        pairs = zip(reports, texts, strict=True)
        return "; ".join(f"node {report.address}: {text}" for report, text in pairs if text)

    ours = reports[0].versions
    different = [
        ", ".join(
            f"{k} {r.versions.get(k, 'absent')}, not {v}"
            for k, v in ours.items()
            if r.versions.get(k) != v
        )
        for r in reports
    ]
    found = ", ".join(f"{name} {version}" for name, version in ours.items())
    yield Check("versions", f"{len(reports)} nodes: {found}", faults(different))
    broken = ["; ".join(f"{k}: {v}" for k, v in r.failed_imports.items()) for r in reports]
    yield Check("imports", ", ".join(IMPORTS), faults(broken))
    written = len(list(folder.glob(f"{word}-*")))
    unseen = (
        ""
        if written >= len(reports)
        else f"{len(reports) - written} of {len(reports)} nodes write elsewhere"
    )
    shared = faults([r.folder_problem for r in reports]) or unseen
    remedy = "; run.dir must be a folder that all nodes share" if shared else ""
    yield Check("folder", str(folder), shared + remedy)
    yield Check("model", recipe.model.path, faults([r.model_problem for r in reports]))
    cut = [f"cannot connect to {', '.join(others)}" if others else "" for others in cut_off]
    yield Check("ports", "each node reaches every other", faults(cut))


def check_supply(recipe: Recipe) -> Check:
    """Whether the cluster, were it empty, could hold the recipe; bundles go to the nodes with most room first."""
    import ray

    bundles = plan_bundles(recipe, learner=True, rollouts=True)
    nodes = [Counter(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    kinds = sorted({"GPU", *(kind for bundle in bundles.resources for kind in bundle)} - {"CPU"})
    found = "; ".join(words({k: n[k] for k in kinds if n[k]}) or "no GPU" for n in nodes)
    for bundle in sorted(bundles.resources, key=lambda one: -one.get("GPU", 0.0)):
        fits = [n for n in nodes if all(n[kind] >= amount for kind, amount in bundle.items())]
        if not fits:
            return Check(
                "resources",
                f"the nodes have: {found}",
                f"the recipe needs {bundles.needed()}; add nodes, or lower learner.num_workers, rollouts.num_workers "
                "or rollouts.tensor_parallel_size",
            )
        max(fits, key=lambda n: n["GPU"]).subtract(bundle)
    return Check("resources", f"{bundles.needed()}; the nodes have: {found}")


def check_reward(inputs: Inputs) -> Check:
    """The gold test of a run's start, timed."""
    from ..rewards.gold import run_gold_test

    recipe, records = inputs.recipe, inputs.records
    if recipe.reward is None:
        return Check("reward", "none")
    with open_scorer(recipe) as scorer:
        report = run_gold_test(
            scorer, sample(records, min(CHECKED, recipe.reward.gold_samples or CHECKED))
        )
    problem = ""
    if recipe.reward.gold_samples and not report.passes(recipe.reward.max_gold_failures):
        problem = "it fails the gold test: " + " ".join(report.lines())
    seconds = [verdict.seconds for verdict in (*report.gold, *report.corrupted)]
    if seconds and median(seconds) > recipe.reward.timeout_seconds / 2:
        problem = (
            f"one score takes {median(seconds):.2f} s, more than half of "
            f"reward.timeout_seconds = {recipe.reward.timeout_seconds:g}"
        )
    each = f", {1000 * median(seconds):.1f} ms each" if seconds else ""
    return Check("reward", f"{recipe.reward.function}{each}", problem)
