"""B3: tokens/s through the pool against vLLM's own `LLM.generate` on the same requests, SmolLM2-135M in bfloat16.

Both have the same engine arguments and an engine process of their own. No response ends before its length, which is
drawn once, by a model folder whose end-of-sequence token is one that the model never writes. `batch`: both return
log-probs. `streamed`: the pool returns log-probs and each sample is graded while others are drawn, against a bare call
that does neither.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from figures import at_least
from harness import Session, Side, Work
from plait.engine.types import Prompt, Rollout, RolloutRequest, Sampling
from plait.launch.cluster import ray_cluster
from plait.launch.model import resolve_model
from plait.rewards.config import RewardConfig
from plait.rewards.scorer import ProcessScorer
from plait.rollouts.config import RolloutConfig
from plait.rollouts.engine_process import engine_args, environment
from plait.rollouts.pool import Pool
from plait.rollouts.worker import sample_seed
from shapes import lengths_like_answers

MODEL = "smollm2-135m-instruct"
NEVER = "<gh_stars>"
DTYPE = "bfloat16"
PROMPTS, GROUP_SIZE, PROMPT_TOKENS = 8, 8, 96
CONFIG = RolloutConfig(
    max_prompt_length=128, max_response_length=128, max_num_seqs=64, kv_cache_gib=1.0
)


def endless_model(folder: Path) -> Path:
    """The model with an end-of-sequence token that it does not use; weights are not copied."""
    source = Path(resolve_model(MODEL))
    added = json.loads((source / "tokenizer.json").read_text())["added_tokens"]
    never = next(token["id"] for token in added if token["content"] == NEVER)
    changes = {
        "config.json": {"eos_token_id": never},
        "generation_config.json": {"eos_token_id": never},
        "tokenizer_config.json": {"eos_token": NEVER},
    }
    folder.mkdir()
    for file in source.iterdir():
        if file.name in changes:
            settings = json.loads(file.read_text()) | changes[file.name]
            (folder / file.name).write_text(json.dumps(settings))
        else:
            (folder / file.name).symlink_to(file)
    return folder


def make_requests(number: int) -> list[RolloutRequest]:
    """Fresh prompts for every number, of equal lengths, so that no cache knows them."""
    rng = np.random.default_rng([number + 1])
    lengths = lengths_like_answers(0, PROMPTS, mean=24, cap=CONFIG.max_response_length)
    requests = []
    for i, length in enumerate(lengths):
        tokens = tuple(rng.integers(100, 20_000, PROMPT_TOKENS).tolist())
        prompt = Prompt(f"{number}/{i}", (), tokens, answer="7")
        requests.append(RolloutRequest(prompt, GROUP_SIZE, Sampling(length)))
    return requests


def work(requests: Sequence[RolloutRequest], generated: Sequence[tuple[str, int]]) -> Work:
    """Generated tokens; the digest is of prompts and lengths, which is what both sides are given."""
    prompts = {request.prompt.prompt_id: request.prompt.token_ids for request in requests}
    rows = [(*prompts[prompt_id], length) for prompt_id, length in generated]
    return Work(sum(length for _, length in generated), Work.of(rows).digest)


def lengths(rollouts: Sequence[Rollout]) -> list[tuple[str, int]]:
    return [(rollout.prompt_id, len(rollout.logprobs)) for rollout in rollouts]


class Bare:
    """vLLM as it is called without an engine around it."""

    def __init__(self, model: Path) -> None:
        from vllm import LLM

        os.environ |= environment(CONFIG)
        self._llm: Any = LLM(**engine_args(str(model), CONFIG, DTYPE))

    def side(self, *, logprobs: bool) -> Side:
        def run(requests: list[RolloutRequest]) -> Any:
            prompts, params = [], []
            for request in requests:
                for index in range(request.n):
                    prompts.append({"prompt_token_ids": list(request.prompt.token_ids)})
                    params.append(sampling_params(request, index, logprobs=logprobs))
            return self._llm.generate(prompts, params, use_tqdm=False)

        def prove(requests: list[RolloutRequest], outputs: Any) -> Work:
            names = [request.prompt.prompt_id for request in requests for _ in range(request.n)]
            counts = [len(output.outputs[0].token_ids) for output in outputs]
            return work(requests, list(zip(names, counts, strict=True)))

        return Side("LLM.generate", run, prove, make_requests)


def sampling_params(request: RolloutRequest, index: int, *, logprobs: bool) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=request.sampling.max_tokens,
        temperature=1.0,
        seed=sample_seed(0, 0, request.prompt.prompt_id, index),
        logprobs=0 if logprobs else None,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def measure(session: Session) -> None:
    with TemporaryDirectory() as folder, ray_cluster():
        model = endless_model(Path(folder) / "model")
        pool = Pool(str(model), CONFIG, dtype=DTYPE, seed=0)
        scorer = ProcessScorer(RewardConfig(function="boxed_math"))
        try:
            bare = Bare(model)
            pool.wait_started()
            scorer.wait_ready()
            compare(session, bare, pool, scorer)
        finally:
            pool.close()
            scorer.close()


def compare(session: Session, bare: Bare, pool: Pool, scorer: ProcessScorer) -> None:
    def drawn(requests: list[RolloutRequest]) -> list[Rollout]:
        return list(pool.generate(requests, step=0))

    def scored(requests: list[RolloutRequest]) -> list[Rollout]:
        groups = scorer.score(requests, pool.generate(requests, step=0))
        return [rollout for group in groups for rollout in group.rollouts]

    def side(name: str, run: Callable[[list[RolloutRequest]], list[Rollout]]) -> Side:
        return Side(name, run, lambda given, found: work(given, lengths(found)), make_requests)

    tokens = sum(GROUP_SIZE * request.sampling.max_tokens for request in make_requests(0))
    note = f"{PROMPTS} prompts of {GROUP_SIZE} samples, {tokens} tokens a run"
    session.compare(
        "batch, tokens/s of the pool / LLM.generate",
        bare.side(logprobs=True),
        side("pool", drawn),
        target=at_least(0.97),
        seconds=170,
        note=note,
    )
    session.compare(
        "streamed and scored / LLM.generate without log-probs",
        replace(bare.side(logprobs=False), name="LLM.generate without log-probs"),
        side("pool and scorer", scored),
        target=at_least(0.93),
        seconds=170,
        note=note,
    )
