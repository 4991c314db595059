"""One data-parallel rank of the learner: a DeepSpeed engine around PolicyModel.

The class is plain: it is a Ray actor in a run, and works in process for tests and profiling.

**Numerical contract.** Losses divide by denominators counted over all ranks and micro-batches. DeepSpeed averages
gradients over ranks, so ModelEngine multiplies the loss by the number of ranks; DeepSpeed's own accumulation scaling is
off.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from math import ceil, cos, isfinite, pi
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .batch import blank, from_sequences
from .config import LearnerConfig
from .contracts import LossFn, Need
from .errors import LearnerError
from .failpoints import reach
from .gradients import gram_matrix, keep_source
from .learner_state import Snapshot, StateReader
from .model_engine import ModelEngine
from .model_state import add_model, add_reference, restore_model, restore_reference
from .parameter_selection import make_mask
from .rendezvous import join_ranks
from .state_writer import StateWriter
from .step_sums import REMEDY, derived_metrics, diagnostics, not_finite
from .types import (
    PolicyOutput,
    Source,
    TokenSampling,
    TrainBatch,
    UpdateReport,
)

if TYPE_CHECKING:
    from .durable import FileRecord
    from .weight_sync import WeightSender


@dataclass(frozen=True)
class Rank:
    """This process's place among the learner's ranks."""

    index: int = 0
    world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    """Of rank 0's store; one rank alone needs none."""


@dataclass(frozen=True)
class WeightRoute:
    """How weights travel to the rollout workers."""

    kind: Literal["shared_memory", "nccl", "ipc"]
    dtype: Literal["float32", "bfloat16"]
    """The rollout workers'."""
    timeout_seconds: float
    ranks_per_receiver: int = 1


def learning_rate(config: LearnerConfig, step: int, total_steps: int) -> float:
    """Rate of loop step `step` (0 is the first): linear warm-up, then constant, linear or cosine decay to 0."""
    warmup = ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    factor = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + cos(pi * progress)) / 2,
    }[config.schedule]
    return config.learning_rate * factor


class LearnerWorker:
    """Holds the policy with its optimizer and, where a loss needs them, the frozen reference and the critic."""

    def __init__(
        self,
        model_path: str,
        config: LearnerConfig,
        losses: Mapping[str, LossFn],
        needs: Mapping[str, frozenset[Need]],
        rank: Rank,
        token_sampling: TokenSampling | None = None,
        seed: int = 0,
        entropy_top_k: int | None = None,
        deterministic: bool = False,
    ) -> None:
        """`deterministic`: equal calls give equal bits, on a GPU too; an operation that cannot is an error."""
        from .critic import load_critic
        from .model import PolicyModel, load_model

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning)
        self.config, self.losses, self.needs, self.rank = config, losses, needs, rank
        self.model_path = model_path
        self.device = (
            torch.device(config.device, 0) if config.device == "cuda" else torch.device("cpu")
        )
        torch.set_num_threads(config.num_cpus)
        torch.manual_seed(
            0
        )  # fresh adapters and heads; afterwards nothing draws from torch's own generators
        torch.use_deterministic_algorithms(deterministic)
        self._join_ranks()
        model = load_model(model_path, config)
        model.train()
        self.reference: PolicyModel | None = None
        self.reference_moved = False
        layout = {"packing": config.packing, "logit_chunk_tokens": config.logit_chunk_tokens}
        if any(need & {"ref_logprobs", "ref_kl"} for need in needs.values()):
            frozen = load_model(model_path, config.model_copy(update={"parameter_selection": None}))
            frozen.requires_grad_(False).eval().to(self.device)
            self.reference = PolicyModel(frozen, **layout)
        policy = PolicyModel(
            model,
            token_sampling=token_sampling,
            entropy_top_k=entropy_top_k,
            reference=self.reference,
            **layout,
        )
        self.engine = ModelEngine(policy, config, "policy")
        self.engine.mask = make_mask(self.engine.deepspeed, config, seed)
        policy.check_head()
        self.critic: ModelEngine | None = None
        if any(need & {"values", "new_values"} for need in needs.values()):
            self.critic = ModelEngine(load_critic(model_path, config), config, "critic")
        self._begun: dict[str, Tensor] = {}
        """Sums over the micro-batches of `begin`; their gradients are in the engine."""
        self.sender: WeightSender | None = None
        self.writer = StateWriter()

    def _join_ranks(self) -> None:
        import deepspeed

        if torch.distributed.is_initialized():
            present = torch.distributed.get_world_size()
            if present != self.rank.world_size:
                text = f"this process is one of {present} ranks; {self.rank.world_size} need fresh ones"
                raise LearnerError(text)
            return
        # DeepSpeed reads the same facts from the environment.
        os.environ.update(
            RANK=str(self.rank.index), WORLD_SIZE=str(self.rank.world_size), LOCAL_RANK="0"
        )
        backend = "nccl" if self.config.device == "cuda" else "gloo"
        timeout = timedelta(seconds=self.config.timeout_seconds)
        join_ranks(self.rank, backend, timeout)
        # Else DeepSpeed compiles a shared-memory all-reduce at every start, under a lock file that outlives a killed
        # process and that all later ones wait for; gloo and NCCL reduce without it.
        ops: Any = deepspeed.ops
        ops.__compatible_ops__ = {}
        deepspeed.init_distributed(
            dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False
        )

    # -- forward ------------------------------------------------------------------------------

    def annotate(
        self, micro_batches: Sequence[TrainBatch], needs: frozenset[Need]
    ) -> list[dict[str, Tensor]]:
        """No-grad columns of each micro-batch, as declared: log-probs, entropy and values [T], sketches [N]."""
        columns: list[dict[str, Tensor]] = []
        for micro_batch in micro_batches:
            batch = self._to_device(micro_batch)
            column: dict[str, Tensor] = {}
            with torch.no_grad():
                if needs & {"old_logprobs", "old_entropy", "row_sketch"}:
                    self.engine.module.keeps_hidden = "row_sketch" in needs
                    extra = frozenset[Need]({"entropy"} if "old_entropy" in needs else ())
                    found = self.engine(batch, extra)
                    column["old_logprobs"] = found.logprobs
                    if found.entropy is not None:
                        column["old_entropy"] = found.entropy
                if "row_sketch" in needs:
                    column |= self.engine.module.sketch_rows(batch, self.config.zero_stage)
                if "ref_logprobs" in needs:
                    assert self.reference is not None
                    column["ref_logprobs"] = self.reference(batch).logprobs
                if "values" in needs:
                    assert self.critic is not None
                    column["values"] = self.critic(batch)
            blank_row = micro_batch.num_rows == 0
            columns.append({k: v[:0] if blank_row else v.cpu() for k, v in column.items()})
        return columns

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of tokens 1.. of each sequence under the current policy."""
        batch = self._to_device(from_sequences(sequences))
        with torch.no_grad():
            logprobs = self.engine(batch).logprobs
        return [row[1:].tolist() for row in logprobs.split(batch.row_starts.diff().tolist())]

    # -- one optimizer step --------------------------------------------------------------------

    def begin(
        self, micro_batches: Sequence[TrainBatch], loss_name: str, coefs: Mapping[str, float]
    ) -> None:
        """Accumulate the gradients of a minibatch's first micro-batches; `step` gets the others."""
        self._begun = self._run(micro_batches, loss_name, coefs, ends=False)

    def step(
        self,
        micro_batches: Sequence[TrainBatch],
        loss_name: str,
        coefs: Mapping[str, float],
        learning_rate: float,
        optimizer: str = "main",
    ) -> UpdateReport:
        """Accumulate the gradients of a minibatch and apply them with the AdamW moments of that name.

        A loss that needs `new_values` moves the critic, every other one the policy. Where the loss, a metric or the
        gradient is not finite on any rank, no rank changes anything, and the report says what it was.
        """
        metrics = self._accumulate(micro_batches, loss_name, coefs)
        engine = self._trained_by(loss_name)
        bad = not_finite(metrics)
        if bad:
            grad_norm = engine.discard()
        else:
            if engine.mask is not None:
                metrics["trained_share"] = engine.mask.select()
            grad_norm = engine.apply(learning_rate, optimizer)
            bad = [] if isfinite(grad_norm) else ["gradient"]
            if bad and engine.mask is not None:
                engine.mask.retract()
        metrics = {name: value for name, value in metrics.items() if isfinite(value)}
        return UpdateReport(
            loss_name, grad_norm, metrics, learning_rate, model=engine.name, skipped=", ".join(bad)
        )

    def gradients(
        self,
        micro_batches: Sequence[TrainBatch],
        loss_name: str,
        coefs: Mapping[str, float],
        only: Source | None = None,
    ) -> tuple[UpdateReport, dict[str, Tensor]]:
        """The minibatch's gradient by parameter, full size on every rank; nothing is applied.

        With `only`, the part of it that goes through tokens of that source.
        """
        metrics = self._accumulate(micro_batches, loss_name, coefs, only)
        if bad := not_finite(metrics):
            raise LearnerError(
                f"update {loss_name!r}: {', '.join(bad)} not finite, so its gradient cannot be measured. {REMEDY}"
            )
        engine = self._trained_by(loss_name)
        found = {name: gradient.clone() for name, gradient in engine.gradients()}
        norm = engine.discard()
        return UpdateReport(loss_name, norm, metrics, 0.0, model=engine.name), found

    def compare_gradients(
        self, probes: Sequence[tuple[Sequence[TrainBatch], str, Mapping[str, float], Source | None]]
    ) -> tuple[list[list[float]], list[dict[str, float]]]:
        """Arguments of `gradients` by probe -> dot products of all pairs, and each probe's metrics.

        Each rank keeps 1 / ranks of every gradient, in host memory.
        """
        shares, metrics = [], []
        for micro_batches, loss_name, coefs, only in probes:
            metrics.append(self._accumulate(micro_batches, loss_name, coefs, only))
            engine = self._trained_by(loss_name)
            shares.append(engine.gradient_share())
            engine.discard()
        gram = gram_matrix(shares).to(self.device)
        if self.rank.world_size > 1:
            torch.distributed.all_reduce(gram)
        return gram.tolist(), metrics

    def _trained_by(self, loss_name: str) -> ModelEngine:
        """The model that a loss trains."""
        if "new_values" not in self.needs[loss_name]:
            return self.engine
        assert self.critic is not None
        return self.critic

    def _accumulate(
        self,
        micro_batches: Sequence[TrainBatch],
        loss_name: str,
        coefs: Mapping[str, float],
        only: Source | None = None,
    ) -> dict[str, float]:
        """Forward and backward of every micro-batch; metrics summed over micro-batches and ranks."""
        begun, self._begun = self._begun, {}
        totals = self._run(micro_batches, loss_name, coefs, only)
        sums = self._sum_over_ranks(
            {n: totals.get(n, 0) + begun.get(n, 0) for n in {*totals, *begun}}
        )
        return derived_metrics(sums) if self._trained_by(loss_name) is self.engine else sums

    def _run(
        self,
        micro_batches: Sequence[TrainBatch],
        loss_name: str,
        coefs: Mapping[str, float],
        only: Source | None = None,
        *,
        ends: bool = True,
    ) -> dict[str, Tensor]:
        """Forward and backward; metrics summed over these micro-batches. `ends`: the optimizer step follows."""
        loss_fn, needs, engine = (
            self.losses[loss_name],
            self.needs[loss_name],
            self._trained_by(loss_name),
        )
        totals: dict[str, Tensor] = {}
        for i, micro_batch in enumerate(micro_batches):
            batch = self._to_device(micro_batch)
            out = self._output(engine, batch, needs)
            if "old_logprobs" in needs and batch.old_logprobs is None:
                # One optimizer step consumes the whole batch: the old policy is the current one.
                batch = replace(batch, old_logprobs=out.logprobs.detach())
            if only is not None:
                out = keep_source(out, batch, only)
            result = loss_fn(out, batch, coefs)
            engine.backward(result.loss, last=ends and i == len(micro_batches) - 1)
            measured = {"loss": result.loss, **result.metrics}
            if engine is self.engine:
                measured |= diagnostics(batch, out.logprobs.detach(), engine.module.hidden_grads)
            for name, value in measured.items():
                totals[name] = totals.get(name, 0) + value.detach().double()
        return totals

    def _output(
        self, engine: ModelEngine, batch: TrainBatch, needs: frozenset[Need]
    ) -> PolicyOutput:
        """Forward pass of the model that trains, with gradient."""
        if engine is self.critic:
            values = engine(batch)
            return PolicyOutput(torch.full_like(values, torch.nan), values=values)
        return engine(batch, needs).to_policy_output(engine.module.vocabulary)

    def _sum_over_ranks(self, totals: Mapping[str, Tensor]) -> dict[str, float]:
        names = sorted(totals)
        values = torch.stack([totals[name] for name in names])
        if self.rank.world_size > 1:
            torch.distributed.all_reduce(values)
        return dict(zip(names, values.tolist(), strict=True))

    def _to_device(self, batch: TrainBatch) -> TrainBatch:
        return (batch if batch.num_rows else blank(batch)).to(self.device)

    # -- weights and checkpoints ---------------------------------------------------------------

    def connect(self, receivers: Sequence[Any], route: WeightRoute) -> None:
        """Open the way to the rollout workers; `receivers` are handles with vLLM's weight-update methods.

        May be called again, with the same route: what the sender holds, a copy of all weights, is there once.
        """
        from .model import DTYPES
        from .weight_sync import make_sender

        if self.sender is None:
            self.sender = make_sender(
                route.kind,
                rank=self.rank.index,
                dtype=DTYPES[route.dtype],
                timeout_seconds=route.timeout_seconds,
                ranks_per_receiver=route.ranks_per_receiver,
            )
        self.sender.connect(receivers)

    def send_weights(self, version: int) -> Mapping[str, str]:
        """Deliver the weights (every rank takes part); rank 0 returns the checksum of each parameter."""
        if self.sender is None:
            raise LearnerError("send_weights before connect: the learner knows no receivers")
        return self.sender.send(self._full_weights, version)

    def _full_weights(self) -> Iterator[tuple[str, Tensor]]:
        from .model import full_weights

        return full_weights(self.engine.module.model, self.config.zero_stage)

    def refresh_reference(self) -> None:
        """Copy the current weights into the frozen reference; from now on checkpoints hold it too."""
        if self.reference is None:
            raise LearnerError(
                "refresh_reference: no loss needs ref_logprobs or ref_kl, so there is none"
            )
        frozen = dict(self.reference.model.named_parameters())
        for name, weight in self._full_weights():
            frozen[name].data.copy_(weight)
        self.reference_moved = True

    @property
    def _engines(self) -> list[ModelEngine]:
        return [engine for engine in (self.engine, self.critic) if engine is not None]

    def save(self, folder: str) -> None:
        """Copy this rank's share of the state to host memory; a thread writes it while training goes on."""
        snapshot = Snapshot()
        snapshot.facts = {"rank": self.rank.index, "world_size": self.rank.world_size}
        for engine in self._engines:
            add_model(snapshot, engine)
        if self.reference is not None and self.reference_moved:
            add_reference(snapshot, self.reference.model)
        reach("checkpoint.snapshot_taken")
        path = Path(folder) / f"rank-{self.rank.index:05d}.safetensors"
        self.writer.start(path, snapshot, self.rank.world_size)

    def saved(self, wait: bool) -> FileRecord | None:
        """The file that `save` began, once it is on the disk; raises CheckpointError where it could not be written."""
        return self.writer.finished(wait=wait)

    def load(self, paths: Sequence[str]) -> None:
        """Take over the state in these files, whatever number of ranks wrote them. No collectives."""
        reader = StateReader(list(map(Path, paths)))
        for engine in self._engines:
            restore_model(reader, engine)
        if self.reference is not None:
            self.reference_moved = restore_reference(reader, self.reference.model)

    def export(self, folder: str) -> None:
        """Write config, tokenizer and safetensors; adapters are merged."""
        from transformers import AutoTokenizer

        model = self.engine.module.model
        # The generator gathers shards, so every rank walks it; only rank 0 keeps what it yields.
        state = {
            name: weight.to("cpu", copy=True)
            for name, weight in self._full_weights()
            if self.rank.index == 0
        }
        if self.rank.index == 0:
            base = type(model)(model.config) if self.config.adapters else model
            base.save_pretrained(folder, state_dict=state)
            AutoTokenizer.from_pretrained(self.model_path).save_pretrained(folder)

    def close(self) -> None:
        if self.sender is not None:
            self.sender.close()
