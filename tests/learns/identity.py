"""The identity task on real learners and the real loop, in process: prompt `start x`, demonstration `x end`.

The verifier reads the answer, the first token: a random policy is right once in 18. Without the start token a causal
model could not tell the answer `x x` from the prompt.

All is what a run uses but the sampler: vLLM takes longer to start than an algorithm needs to learn this. Rollouts
come from a copy of the model in plain transformers. Each sync copies the weights into it, and its proof is honest: it
hashes the copy and computes the probes with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from plait.algorithms import AlgorithmBase, Setup, resolve
from plait.engine.checkpoint import Checkpoints
from plait.engine.config import CheckpointConfig, EvalConfig, LearnerConfig, LoopConfig
from plait.engine.learner import LearnerWorker, Rank, WeightRoute
from plait.engine.learners import InProcessRank, LearnerGroup
from plait.engine.loop import Parts, train
from plait.engine.metrics import RunLog
from plait.engine.model import token_logprobs
from plait.engine.sync_proof import Tolerance
from plait.engine.types import (
    Demonstration,
    Prompt,
    Rollout,
    RolloutGroup,
    RolloutRequest,
    Sampling,
    Score,
    TokenIds,
)
from plait.engine.weight_sync import checksum
from plait.launch.console import PlainConsole
from plait.rollouts.in_process import ModelSampler
from plait.rollouts.worker import WorkerProof

END, START, FIRST, NUM_SYMBOLS = 0, 1, 2, 16
VOCABULARY = FIRST + NUM_SYMBOLS
MAX_TOKENS = 2
RIGHT = Score.ok(1.0)


def make_model(folder: Path) -> Path:
    """One random layer, embeddings not tied: tied ones would copy the prompt before any training."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
        initializer_range=0.05,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make_prompt(symbol: int) -> Prompt:
    """A demonstration has one piece, so that nothing of it can be shown as a hint but by token."""
    name = str(symbol)
    demonstration = Demonstration((symbol, END), name, origin="identity", piece_lengths=(1,))
    return Prompt(
        name, ({"role": "user", "content": name},), (START, symbol), name, None, (demonstration,)
    )


class IdentityData:
    """contracts.DataSource: the symbols in turn."""

    def __init__(self) -> None:
        self.prompts = [make_prompt(FIRST + i) for i in range(NUM_SYMBOLS)]
        self.eval_prompts: Sequence[Prompt] = tuple(self.prompts)
        self.position = self.expert_position = 0
        self.vocabulary_size = VOCABULARY

    def take(self, n: int) -> Sequence[Prompt]:
        self.position += n
        return self._at(self.position - n, n)

    def take_experts(self, n: int) -> Sequence[Prompt]:
        self.expert_position += n
        return self._at(self.expert_position - n, n)

    def _at(self, start: int, n: int) -> list[Prompt]:
        return [self.prompts[i % NUM_SYMBOLS] for i in range(start, start + n)]

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        pass

    def metrics(self) -> Mapping[str, float]:
        return {}

    def find(self, prompt_id: str) -> Prompt:
        return self.prompts[int(prompt_id) - FIRST]

    def is_out_of_reach(self, prompt_id: str) -> bool:
        return False

    def show_hint(self, prompt: Prompt, hint: TokenIds) -> Prompt:
        return replace(prompt, token_ids=(START, *hint, prompt.token_ids[-1]))

    def empty_prompt(self, prompt: Prompt) -> TokenIds:
        return (START,)

    def state_dict(self) -> dict[str, Any]:
        return {"prompts": self.position, "experts": self.expert_position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position, self.expert_position = state["prompts"], state["experts"]


class IdentityScorer:
    """contracts.Scorer: 1 where the first token is the symbol."""

    def score(
        self,
        requests: Sequence[RolloutRequest],
        rollouts: Iterable[Rollout],
        earlier: Sequence[RolloutGroup] = (),
        *,
        num_groups: int | None = None,
    ) -> list[RolloutGroup]:
        assert num_groups is None, "no task here samples more than it trains"
        prompts = {request.prompt.prompt_id: request.prompt for request in requests}
        arrived = sorted(rollouts, key=lambda rollout: rollout.index)
        groups = []
        for prompt_id, prompt in prompts.items():
            mine = tuple(rollout for rollout in arrived if rollout.prompt_id == prompt_id)
            groups.append(RolloutGroup(prompt, mine, tuple(grade(prompt, r) for r in mine)))
        return groups

    def grade(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return [
            replace(p, demonstrations=tuple(replace(d, score=RIGHT) for d in p.demonstrations))
            for p in prompts
        ]

    def close(self) -> None:
        """Nothing is held."""


def grade(prompt: Prompt, rollout: Rollout) -> Score:
    answer = rollout.token_ids[0]
    return Score.ok(float(answer == prompt.token_ids[-1]), answer=str(answer))


class CopySampler(ModelSampler):
    """contracts.RolloutPool over a copy of the model, which weight syncs overwrite."""

    def interrupt(self) -> Sequence[Rollout]:
        """Samples are drawn when they are asked for: none is under way."""
        return ()

    def receivers(self) -> Sequence[Any]:
        return [self]

    def receive(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        self.model.load_state_dict(weights)
        self.version = version

    def prove(
        self, version: int, probes: Sequence[Sequence[int]], receivers: Sequence[Any]
    ) -> Sequence[WorkerProof]:
        sums = {name: checksum(weight) for name, weight in self.model.named_parameters()}
        logprobs = tuple(self._logprobs(torch.tensor(probe)) for probe in probes)
        return [WorkerProof("copy", self.version, sums, (), logprobs)]

    def admit(self, version: int, receivers: Sequence[Any], sync: Any) -> None:
        """It never dies, so nobody takes its place."""

    def status(self) -> Sequence[Mapping[str, Any]]:
        return ()

    @torch.no_grad()
    def _logprobs(self, probe: torch.Tensor) -> tuple[float, ...]:
        logits = self.model(input_ids=probe[None]).logits[0]
        return tuple(token_logprobs(logits[:-1], probe[1:]).tolist())

    def close(self) -> None:
        """Nothing is held."""


class CopySender:
    """weight_sync.WeightSender within one process."""

    def __init__(self, receivers: Sequence[CopySampler]) -> None:
        self.connect(receivers)

    def connect(self, receivers: Sequence[Any]) -> None:
        self.receivers = receivers

    def send(self, weights: Any, version: int) -> Mapping[str, str]:
        state = {name: weight.clone() for name, weight in weights()}
        for receiver in self.receivers:
            receiver.receive(state, version)
        return {name: checksum(weight) for name, weight in state.items()}

    def close(self) -> None:
        """Nothing is held."""


class CopyingWorker(LearnerWorker):
    """Sends its weights by copying them."""

    def connect(self, receivers: Sequence[Any], route: WeightRoute) -> None:
        self.sender = CopySender(receivers)


@dataclass(frozen=True)
class Outcome:
    before: float
    """Success rate at temperature 1, over 8 samples a symbol."""
    after: float
    metrics: list[dict[str, float]]
    """Rows of metrics.jsonl without times."""
    weights: dict[str, torch.Tensor]


def run(model: Path, folder: Path, section: dict[str, Any], steps: int, rate: float) -> Outcome:
    """Train the algorithm of this recipe section from the random model."""
    sampling = Sampling(MAX_TOKENS)
    loop = LoopConfig(steps=steps, prompts_per_step=NUM_SYMBOLS)
    learner = LearnerConfig(learning_rate=rate, num_cpus=1, adam_epsilon=1e-8, weight_decay=0.0)
    evaluation = EvalConfig(num_prompts=NUM_SYMBOLS, rollouts_per_prompt=8, temperature=1.0)
    data, algorithm = IdentityData(), build(section, Setup(sampling))
    algorithm.use_prompts(data)
    worker = CopyingWorker(
        str(model), learner, algorithm.losses, algorithm.needs, Rank(), algorithm.token_sampling
    )
    copy = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    with ExitStack() as stack:
        log = RunLog(folder, PlainConsole())
        stack.callback(log.close)
        state = train(
            loop,
            evaluation,
            sampling,
            Parts(
                algorithm=algorithm,
                data=data,
                rollouts=CopySampler(copy, str, stop_token_ids=[END], seed=0),
                scorer=IdentityScorer(),
                learners=LearnerGroup(
                    InProcessRank(worker),
                    learner,
                    algorithm.needs,
                    total_steps=steps,
                    seed=0,
                    route=WeightRoute("shared_memory", "float32", 60.0),
                ),
                checkpoints=Checkpoints(folder / "checkpoints", CheckpointConfig()),
                log=log,
                probes=[(START, FIRST, FIRST + 1, END)],
                tolerance=Tolerance.for_dtype("float32"),
            ),
        )
    assert state.eval_before is not None
    assert state.eval_after is not None
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    weights = {name: weight.clone() for name, weight in copy.state_dict().items()}
    return Outcome(state.eval_before.accuracy, state.eval_after.accuracy, metrics, weights)


def build(section: dict[str, Any], setup: Setup) -> AlgorithmBase:
    cls = resolve(section["type"])
    config = cls.Config.with_limit(section, MAX_TOKENS)
    return cls(cls.Config.model_validate(config), setup)
