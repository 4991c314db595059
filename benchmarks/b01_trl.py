"""B1: against TRL 1.16 on SmolLM2-135M: supervised steps, GRPO's learner on stored rollouts, GRPO end to end.

TRL runs in an environment of its own (make peer-trl), at the settings that are fastest for it here: bfloat16 weights
and optimizer states, padded micro-batches of the whole step, no recomputation, transformers' generation (its vLLM mode
does not work on a CPU). It is measured twice: as it is, and with its LM head changed to project trained positions only.
plait trains in bfloat16 with float32 master weights, which is more work for the optimizer, proves each weight sync, and
computes the prompt of a group once; targets are those for prompts that are shared.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from b03_rollouts import endless_model
from figures import Target, at_least
from harness import Session, Side, Work
from loop_run import LoopRun
from plait.algorithms import Setup
from plait.algorithms.grpo import Grpo, GrpoConfig
from plait.algorithms.sft import Sft, SftConfig
from plait.engine.batch import collate
from plait.engine.config import LearnerConfig
from plait.engine.learner import WeightRoute
from plait.engine.learners import LearnerGroup
from plait.engine.ray_ranks import RayRanks
from plait.engine.types import (
    Prompt,
    Rollout,
    RolloutGroup,
    RolloutRequest,
    Sample,
    Sampling,
    Score,
    Source,
    Update,
)
from plait.launch.cluster import learner_env, ray_cluster
from plait.launch.model import resolve_model
from plait.rewards.groups import ExpectedGroups
from plait.rollouts.config import RolloutConfig
from plait.rollouts.pool import Pool
from shapes import learner_group, make_row

PYTHON = Path("build/peer-trl/bin/python")
MODEL = "smollm2-135m-instruct"
GROUP_SIZE, RESPONSE = 8, 32
SAMPLING = Sampling(RESPONSE)
LEARNER = {"dtype": "bfloat16", "zero_stage": 1, "max_tokens_per_micro_batch": 2048}
HEADS = {"stock": "TRL", "compact": "TRL with its LM head patched"}
TARGETS = {
    ("sft", "stock"): 1.5,
    ("sft", "compact"): 1.0,
    ("learner", "stock"): 2.5,
    ("learner", "compact"): 1.8,
    ("grpo", "stock"): 3.0,
    ("grpo", "compact"): 1.0,
}
WHAT = {
    "sft": ("supervised, trained tokens/s", 75),
    "learner": ("GRPO learner on stored rollouts, trained tokens/s", 105),
    "grpo": ("GRPO end to end, trained tokens/s", 150),
}
OURS = ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")
"""Environment variables that TRL must not inherit; the last three are set for DeepSpeed."""
Rows = Sequence[Sequence[int]]


class Peer:
    """A trainer of TRL that takes a step when it is asked."""

    def __init__(self, kind: str, head: str, model: str, work: Any, folder: Path) -> None:
        file = folder / f"{kind}.json"
        file.write_text(json.dumps(work))
        script = str(Path(__file__).with_name("peer_trl.py"))
        sizes = ["--group-size", str(GROUP_SIZE), "--response-tokens", str(RESPONSE)]
        command = [str(PYTHON), script, kind, model, str(file), "--head", head, *sizes]
        env = {name: value for name, value in os.environ.items() if name not in OURS}
        env["TRL_EXPERIMENTAL_SILENCE"] = "1"
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
        self._answer()

    def step(self, number: int) -> Rows:
        """The rows that were trained."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._answer()["rows"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _answer(self) -> Mapping[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"TRL ended with exit code {self._process.wait(30)}; see the log")
        return json.loads(line)


def measure(session: Session) -> None:
    if not PYTHON.exists():
        for (kind, head), value in TARGETS.items():
            session.fail(
                name_of(kind, head), "TRL is not installed: make peer-trl", at_least(value)
            )
        return
    rng = np.random.default_rng(0)
    with TemporaryDirectory() as folder:
        rows = expert_rows(rng, 12)
        compare(session, "sft", Sft(SftConfig(), Setup(SAMPLING)), rows, Path(folder))
        rows = policy_rows(rng, 2)
        compare(session, "learner", Grpo(GrpoConfig(), Setup(SAMPLING)), rows, Path(folder))
        measure_loop(session, Path(folder))


def name_of(kind: str, head: str) -> str:
    return f"{WHAT[kind][0]} / {HEADS[head]}"


def expert_rows(rng: np.random.Generator, num: int) -> list[Sample]:
    """Prompts of 59 tokens and answers of 9, as the sums of the quickstart have."""
    prompts = rng.integers(100, 20_000, (num, 59)).tolist()
    return [make_row(rng, prompt, 9, f"e{i}", Source.EXPERT) for i, prompt in enumerate(prompts)]


def policy_rows(rng: np.random.Generator, num_prompts: int) -> list[Sample]:
    prompts = rng.integers(100, 20_000, (num_prompts, 59)).tolist()
    return [
        make_row(rng, prompt, RESPONSE, f"p{i}")
        for i, prompt in enumerate(prompts)
        for _ in range(GROUP_SIZE)
    ]


def as_work(row: Sample) -> dict[str, Any]:
    """A row as peer_trl.py reads it."""
    trained, ids = row.source != Source.CONTEXT, row.token_ids
    advantage = float(row.advantages[-1])
    return {
        "prompt": ids[~trained].tolist(),
        "response": ids[trained].tolist(),
        "advantage": advantage,
    }


def compare(
    session: Session, kind: str, algorithm: Any, rows: Sequence[Sample], folder: Path
) -> None:
    learners = learner_group(Path(resolve_model(MODEL)), algorithm, **LEARNER)

    def run(number: int) -> Rows:
        (report,) = learners.update(collate(rows), Update(tuple(rows), "main", {}), step=0)
        trained = sum(int((row.source != Source.CONTEXT).sum()) for row in rows)
        assert report.applied
        assert report.tokens["policy"] + report.tokens["expert"] == trained
        return [row.token_ids.tolist() for row in rows]

    against_both_heads(session, kind, run, [as_work(row) for row in rows], folder)


def against_both_heads(
    session: Session, kind: str, run: Callable[[int], Rows], work: Any, folder: Path
) -> None:
    _, seconds = WHAT[kind]
    for head in HEADS:
        peer = Peer(kind, head, resolve_model(MODEL), work, folder)
        target: Target = at_least(TARGETS[kind, head])
        try:
            session.compare(
                name_of(kind, head),
                Side(HEADS[head], peer.step, lambda number, rows: Work.of(rows)),
                Side("plait", run, lambda number, rows: Work.of(rows)),
                target=target,
                seconds=seconds,
            )
        finally:
            peer.close()


class TwoPrompts:
    """The same prompts in every step."""

    eval_prompts: Sequence[Prompt] = ()

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts

    def take(self, n: int) -> Sequence[Prompt]:
        return self.prompts

    def take_experts(self, n: int) -> Sequence[Prompt]:
        return ()

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        """The prompts do not depend on them."""

    def metrics(self) -> Mapping[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is none."""


class AnyScorer:
    """Any number that differs within a group, in this process as TRL's is in its own."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        """Prompt ids, then how many tokens were drawn, of the last step."""

    def score(
        self,
        requests: Sequence[RolloutRequest],
        rollouts: Iterable[Rollout],
        earlier: Sequence[RolloutGroup] = (),
    ) -> list[RolloutGroup]:
        groups, scores = ExpectedGroups(requests), {}
        for rollout in rollouts:
            groups.admit(rollout)
            score = sum(rollout.token_ids) % 97 / 97
            scores[rollout.prompt_id, rollout.index] = Score.ok(score)
        found = groups.grouped(scores)
        self.rows = [
            [*group.prompt.token_ids, len(rollout.token_ids)]
            for group in found
            for rollout in group.rollouts
        ]
        return found


def measure_loop(session: Session, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL))
    questions = [f"What is {i} + {3 * i}? Explain it to a child, step by step." for i in (7, 8)]
    talks = [[{"role": "user", "content": question}] for question in questions]
    ids = [
        tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        for talk in talks
    ]
    prompts = [Prompt(f"p/{i}", (), tuple(tokens)) for i, tokens in enumerate(ids)]
    with our_loop(folder, prompts) as (run, scorer):

        def step(number: int) -> Rows:
            run.step()
            return scorer.rows

        against_both_heads(session, "grpo", step, talks, folder)


@contextmanager
def our_loop(folder: Path, prompts: Sequence[Prompt]) -> Iterator[tuple[LoopRun, AnyScorer]]:
    """A rollout worker and a learner rank, as in a run of the quickstart."""
    algorithm = Grpo(GrpoConfig(rollouts_per_prompt=GROUP_SIZE), Setup(SAMPLING))
    model = endless_model(folder / "endless")
    limits = {"max_prompt_length": 128, "max_response_length": RESPONSE, "kv_cache_gib": 0.5}
    config, scorer = LearnerConfig.model_validate(LEARNER), AnyScorer()
    with ray_cluster():
        pool = Pool(str(model), RolloutConfig(**limits), dtype="bfloat16", seed=0)
        ranks = RayRanks(str(model), config, algorithm.losses, algorithm.needs, learner_env())
        run: LoopRun | None = None
        try:
            pool.wait_started()
            ranks.wait_started()
            route = WeightRoute("shared_memory", "bfloat16", 120.0)
            learners = LearnerGroup(
                ranks, config, algorithm.needs, total_steps=10**6, seed=0, route=route
            )
            parts = {"rollouts": pool, "scorer": scorer, "learners": learners}
            run = LoopRun(
                folder / "run",
                algorithm,
                SAMPLING,
                len(prompts),
                data=TwoPrompts(prompts),
                dtype="bfloat16",
                probes=(prompts[0].token_ids,),
                **parts,
            )
            yield run, scorer
        finally:
            if run is not None:
                run.close()
            ranks.close()
            pool.close()
