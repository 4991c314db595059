"""`plait plan`: what a recipe will do, counted before anything starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from ..algorithms import AlgorithmConfig
from ..algorithms.stages import StagesConfig
from ..algorithms.step_size import Phase
from ..engine.config import LearnerConfig
from .config import Recipe

BYTES = {"float32": 4, "bfloat16": 2}
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Counts of the step with most rows, and of the run.

    All are upper bounds: every prompt takes the method's longest way, every row is at its length limits.
    """

    algorithm: str
    steps: int
    prompts_per_step: int
    rollouts: int
    rounds: int
    """Of rollouts, one after the scores of the other."""
    rows: int
    expert_rows: int
    """Of `rows`, those that are demonstrations."""
    phases: tuple[Phase, ...]
    optimizer_steps: int
    """Of the run."""
    ranks: int
    rows_per_minibatch: int
    max_tokens_per_row: int
    max_tokens_per_rank: int
    micro_batches_per_minibatch: int
    old_logprobs: str
    """How the log-probs before the first update are obtained."""
    parameters: int
    learner_gib_per_rank: float
    rollout_gib_per_worker: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The same for a person: each line leads to the next."""
        phases = ", then ".join(
            f"{p.loss}: {p.rows} rows in {p.minibatches} minibatch(es) x {p.epochs} epoch(s)"
            for p in self.phases
        )
        return [
            f"algorithm          {self.algorithm}, {self.steps} steps",
            f"a step             {self.prompts_per_step} prompts, <= {self.rollouts} rollouts in <= {self.rounds} "
            "round(s)",
            f"trained            <= {self.rows} rows, of them <= {self.expert_rows} demonstrations",
            f"optimizer          {phases}; steps of <= {self.rows_per_minibatch} rows, "
            f"<= {self.optimizer_steps} in the run",
            f"a minibatch        <= {self.micro_batches_per_minibatch} micro-batches on each of {self.ranks} rank(s)",
            f"tokens             <= {self.max_tokens_per_row} a row, <= {self.max_tokens_per_rank} a rank and step",
            f"old log-probs      {self.old_logprobs}",
            f"memory (estimate)  learner {self.learner_gib_per_rank:.1f} GiB a rank, "
            f"rollouts {self.rollout_gib_per_worker:.1f} GiB a worker, {self.parameters / 1e6:.1f} M parameters",
        ]


def make_plan(recipe: Recipe, architecture: Any) -> Plan:
    """Count rows, steps and bytes; `architecture` is the model's transformers config."""
    algorithm = recipe.build_algorithm()
    loop, learner, rollouts = recipe.loop, recipe.learner, recipe.rollouts
    sizes = [algorithm.step_size(loop.prompts_per_step, step) for step in range(loop.steps)]
    widest = max(sizes, key=lambda size: (size.rows, size.rollouts))
    longest = rollouts.max_prompt_length + rollouts.max_response_length
    per_minibatch = [ceil(phase.rows / phase.minibatches) for phase in widest.phases]
    per_rank = [ceil(rows / learner.num_workers) for rows in per_minibatch]
    needs = frozenset[str]().union(*algorithm.needs.values())
    wanted = needs & {"old_logprobs", "old_entropy", "recorded_logprobs", "row_sketch"}
    alone = all(phase.optimizer_steps == 1 for phase in widest.phases)
    single = alone and wanted <= {"old_logprobs"}
    parameters, hidden, layers, vocabulary = model_size(architecture)
    return Plan(
        algorithm=describe(recipe.algorithm),
        steps=loop.steps,
        prompts_per_step=loop.prompts_per_step,
        rollouts=widest.rollouts,
        rounds=widest.rounds,
        rows=widest.rows,
        expert_rows=widest.expert_rows,
        phases=widest.phases,
        optimizer_steps=sum(size.optimizer_steps for size in sizes),
        ranks=learner.num_workers,
        rows_per_minibatch=max(per_minibatch),
        max_tokens_per_row=longest,
        max_tokens_per_rank=longest
        * sum(n * phase.minibatches for n, phase in zip(per_rank, widest.phases, strict=True)),
        micro_batches_per_minibatch=ceil(
            max(per_rank) / (learner.max_tokens_per_micro_batch // longest)
        ),
        old_logprobs=(
            "not needed"
            if not wanted
            else "those of the update itself: one optimizer step takes the whole batch"
            if single
            else "a forward pass before the first update"
        ),
        parameters=parameters,
        learner_gib_per_rank=learner_bytes(recipe, parameters, hidden, layers, vocabulary) / GIB,
        rollout_gib_per_worker=parameters * BYTES[rollouts.dtype or learner.dtype] / GIB
        + (rollouts.kv_cache_gib if rollouts.device == "cpu" else 0.0),
    )


def describe(config: AlgorithmConfig) -> str:
    if not isinstance(config, StagesConfig):
        return config.type
    parts = [
        f"{stage.algorithm.type} {f'{stage.steps} steps' if stage.steps else 'for the rest'}"
        for stage in config.stages
    ]
    return f"stages: {', then '.join(parts)}; a step below is one of the stage with most rows"


def model_size(config: Any) -> tuple[int, int, int, int]:
    """Parameters, hidden size, layers, vocabulary; no weights are read."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, config.hidden_size, config.num_hidden_layers, config.vocab_size


def learner_bytes(
    recipe: Recipe, parameters: int, hidden: int, layers: int, vocabulary: int
) -> float:
    """Models with their training state, the frozen reference, activations and one chunk of logits."""
    learner = recipe.learner
    width = BYTES[learner.dtype]
    needs = frozenset[str]().union(*recipe.build_algorithm().needs.values())
    models = model_bytes(learner, parameters) * (2 if "values" in needs else 1)
    reference = parameters * width if "ref_logprobs" in needs else 0
    # About 16 hidden-sized tensors a layer live until the backward pass (2 with checkpointing).
    kept = 2 if learner.gradient_checkpointing else 16
    activations = learner.max_tokens_per_micro_batch * hidden * layers * kept * width
    logits = 3 * 4 * learner.logit_chunk_tokens * vocabulary
    return models + reference + activations + logits


def model_bytes(learner: LearnerConfig, parameters: int) -> float:
    """Weights, gradients and master weights with Adam moments of one trained model: the policy, or a critic like it."""
    ranks, stage, width = learner.num_workers, learner.zero_stage, BYTES[learner.dtype]
    trained = parameters if learner.adapters is None else parameters // 50
    weights = parameters * width / (ranks if stage == 3 else 1)
    gradients = trained * 4 / (ranks if stage >= 2 else 1)
    master = 4 if learner.dtype == "bfloat16" or stage else 0
    mask = 1 + 4 if learner.masks_updates else 0  # with the copy that a step keeps
    optimizer = trained * (8 + master + mask) / (ranks if stage >= 1 else 1)
    return weights + gradients + optimizer
