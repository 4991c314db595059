"""A run with the learner in this process, so that a test can end it anywhere and build all of it anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plait.algorithms import ALGORITHMS
from plait.engine import loop
from plait.engine.checkpoint import Checkpoints
from plait.engine.journal import Journal
from plait.engine.learner import LearnerWorker, Rank, WeightRoute
from plait.engine.learners import InProcessRank, LearnerGroup
from plait.engine.manifest import Manifest
from plait.engine.metrics import RunLog
from plait.engine.run_state import RunState
from plait.engine.sync_proof import SyncProof, Tolerance, digest
from plait.engine.types import Rollout
from plait.launch.config import Recipe
from plait.launch.console import PlainConsole
from plait.launch.run import check_inputs, load_prompts
from plait.rewards.scorer import ProcessScorer


class Dice:
    """A pool without an engine: a sample depends on prompt, index, prefix and step alone."""

    def generate(self, requests: Any, *, step: int) -> Iterator[Rollout]:
        for request in requests:
            name, prefix = request.prompt.prompt_id, request.prefix
            for index in range(request.first_index, request.first_index + request.n):
                seed = [*name.encode(), index, step, len(prefix)]
                own = np.random.default_rng(seed).integers(3, 300, 6).tolist()
                ids, text = (*prefix, *own), " ".join(map(str, own))
                yield Rollout(
                    name, index, ids, len(prefix), (-5.7,) * 6, self.version, "stop", text
                )

    version = 0

    def receivers(self) -> tuple[()]:
        return ()


class Interrupted(BaseException):
    """Nothing in plait catches it: the run ends here, as if its process had been killed."""


@contextmanager
def parts_of(recipe: Recipe, pool: Any, model: Path) -> Iterator[loop.Parts]:
    """All parts of a run, as launch/run.py composes them, around `pool`."""
    folder = recipe.folder
    folder.mkdir(parents=True, exist_ok=True)
    data = load_prompts(check_inputs(recipe), str(model))
    algorithm = recipe.build_algorithm()
    algorithm.use_prompts(data)
    worker = LearnerWorker(
        str(model),
        recipe.learner,
        algorithm.losses,
        algorithm.needs,
        Rank(),
        algorithm.token_sampling,
        recipe.run.seed,
        algorithm.entropy_top_k,
        recipe.run.deterministic,
    )
    drawn = generators()
    route = WeightRoute("shared_memory", "float32", 60.0)
    total = {"total_steps": recipe.loop.steps, "seed": recipe.run.seed, "route": route}
    learners = LearnerGroup(InProcessRank(worker), recipe.learner, algorithm.needs, **total)
    assert recipe.reward is not None
    scorer = ProcessScorer(recipe.reward, str(Path.cwd()))
    log = RunLog(folder, PlainConsole())
    try:
        yield loop.Parts(
            algorithm=algorithm,
            data=data,
            rollouts=pool,
            scorer=scorer,
            learners=learners,
            checkpoints=Checkpoints(folder / "checkpoints", recipe.checkpoint),
            log=log,
            probes=[data.eval_prompts[0].token_ids],
            tolerance=Tolerance.for_dtype("float32"),
            journal=Journal(folder / "journal", recipe.run.seed, log.console.say),
        )
        for kind, before, after in zip(("torch", "numpy"), drawn, generators(), strict=True):
            assert before == after, f"{kind}: every draw has a seed of its own"
    finally:
        scorer.close()
        learners.close()
        log.close()
        torch.use_deterministic_algorithms(False)


def generators() -> tuple[bytes, str]:
    """State of the generators that torch and numpy share among all who ask."""
    return torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state())


def play(
    recipe: Recipe, pool: Any, model: Path, interrupt: Callable[[str], None] | None = None
) -> RunState | None:
    """From the last checkpoint to the end, or to where `interrupt(place)` raises Interrupted: None then."""
    reach, loop.reach = loop.reach, interrupt or loop.reach
    try:
        with parts_of(recipe, pool, model) as parts:
            return loop.train(recipe.loop, recipe.eval, recipe.sampling, parts)
    except Interrupted:
        return None
    finally:
        loop.reach = reach


def believe(parts: loop.Parts, state: RunState, receivers: Any) -> SyncProof:
    """`loop.sync` for Dice, which serves no weights."""
    parts.learners.connect(())
    state.weights = digest(parts.learners.send_weights(state.policy_version))
    Dice.version = state.policy_version
    return SyncProof(state.policy_version, (), 0, 0, 0.0, 0.0)


def strike(name: str, number: int) -> Callable[[str], None]:
    """Interrupts when the place `name` is reached for the `number`-th time."""
    left = number

    def interrupt(place: str) -> None:
        nonlocal left
        left -= place == name
        if place == name and left == 0:
            raise Interrupted

    return interrupt


def everything(folder: Path) -> dict[str, Any]:
    """What must be equal in two runs: learner (sha256 of its files), state, metrics, records, rollouts; no times."""
    checkpoints = Checkpoints(folder / "checkpoints", Recipe.model_fields["checkpoint"].default)
    last = checkpoints.complete()[-1]
    state = json.loads((last / "state.json").read_text())
    for name in ("seconds", "step_seconds", "syncs", "syncs_proved"):
        del state["run"][name]  # a run that was interrupted published its weights once more
    records = Manifest.read(last).files
    found: dict[str, Any] = {"state": state, "last": last.name}
    found |= {f.path: f.sha256 for f in records if f.path != "state.json"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    found["steps"] = (folder / "steps.jsonl").read_text()
    for path in sorted((folder / "rollouts").iterdir()):
        found[path.name] = path.read_text()
    return found


def prompts_of(folder: Path) -> list[str]:
    """Ids of the training stream in the order they were drawn, by the run's own record."""
    lines = (folder / "steps.jsonl").read_text().splitlines()
    return [name for line in lines for name, _ in json.loads(line)["prompts"]]


def sections(name: str, configs: dict[str, Any]) -> dict[str, Any]:
    """The algorithm's section of a recipe, such that a few steps show all of it."""
    section = {"type": name, **configs.get(name, {})}
    if "rollouts_per_prompt" in ALGORITHMS[name].Config.model_fields:
        section["rollouts_per_prompt"] = 3
    return section
