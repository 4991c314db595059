"""What the loop asks of the other folders. `engine` imports none of them; it talks to these Protocols."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from .durable import FileRecord
    from .ledger import ExpertLedger
    from .probes import GradientComparison, GradientProbe
    from .types import (
        LossOutput,
        PolicyOutput,
        Prompt,
        Rollout,
        RolloutGroup,
        RolloutRequest,
        Score,
        Source,
        StepPlan,
        TokenSampling,
        TrainBatch,
        Update,
        UpdateReport,
    )

Need = Literal[
    "old_logprobs",
    "ref_logprobs",
    "values",
    "new_values",
    "entropy",
    "old_entropy",
    "recorded_logprobs",
    "row_sketch",
    "token_samples",
    "demonstrations",
    "demonstration_scores",
    "minibatch_stats",
    "ref_kl",
    "topk_entropy",
    "token_weights",
    "base_logprobs",
    "history_logprobs",
    "prompt_attention",
    "behaviour_logprobs",
    "pairs",
]
"""What a loss consumes beyond tokens and advantages.

`demonstration_scores`: where the data has none, the run's verifier grades a step's demonstrations before `plan`.
`minibatch_stats`: the algorithm's `prepare` gets current log-probs of the whole minibatch.
From `token_weights` to `behaviour_logprobs`: the data stores it with each demonstration. `ref_logprobs` are the data's
where it has them, else the frozen reference's.
`token_samples` are drawn in the forward pass as the algorithm's `token_sampling` says and come as `out.samples`;
`ref_kl`: both full-vocabulary KLs to the frozen reference; `topk_entropy`: the entropy of the `entropy_top_k` largest
logits. `entropy` is differentiable and current; `old_entropy`, `old_logprobs` and `values` (the critic's) are recorded
before the first update. `recorded_logprobs` are old log-probs that `finish` reads: they are recorded even where one
optimizer step takes the whole batch and they equal the current ones. `new_values` marks a loss that trains the critic:
it gets `out.values`, and no log-probs. `row_sketch`: nuclear norm and sketch of each row's logits (row_sketch.py).
"""

PrepareFn = Callable[["TrainBatch", "Tensor | None", Mapping[str, float]], "TrainBatch"]
"""(minibatch, its current log-probs where the loss needs `minibatch_stats`, coefs) -> minibatch with `stats`."""

DrawFn = Callable[[int], Sequence["Prompt"]]
"""draw(n): the next n training prompts of the stream, less those that were already in this step."""

RememberFn = Callable[["TrainBatch"], None]
"""Gets each minibatch as `prepare` left it, once its optimizer step is done."""

RewardFn = Callable[["Prompt", str], "Score | float | None"]
"""(prompt, completion) -> Score, number, or None for UNKNOWN; sync or async."""

LossFn = Callable[["PolicyOutput", "TrainBatch", Mapping[str, float]], "LossOutput"]
"""Pure: no collectives, no step counter, nothing about the cluster; divides by `batch.denom`."""


class Algorithm(Protocol):
    """One method. The learner never knows its name; see docs/algorithms/ for a walk-through."""

    token_sampling: TokenSampling | None
    """How tokens are drawn for losses that need `token_samples`; None for all others."""
    entropy_top_k: int | None
    """K of losses that need `topk_entropy`; None for all others."""

    @property
    def plans_ahead(self) -> bool:
        """`plan` and `expert_rows` depend on nothing that an update changes, and `plan` keeps nothing in the object.

        So a step can be planned and sampled while the one before it trains.
        """
        ...

    @property
    def needs(self) -> Mapping[str, frozenset[Need]]:
        """For each loss, what it consumes; checked against config and data before any worker starts."""
        ...

    @property
    def losses(self) -> Mapping[str, LossFn]: ...

    @property
    def advantage_only(self) -> Mapping[str, frozenset[Source]]:
        """For each loss, the sources whose tokens get no gradient where their advantage is 0.

        Rows that train nothing else are not computed; they stay in every denominator. Losses that are not named
        compute all rows.
        """
        ...

    def expert_rows(self, step: int) -> int:
        """Driver: rows that this step draws from the expert stream, independent of the rollout prompts."""
        ...

    def plan(self, prompts: Sequence[Prompt], experts: Sequence[Prompt], step: int) -> StepPlan:
        """Driver: decide who is rolled out (how often, with which prefix) and whose demonstration trains."""
        ...

    def first_rows(self, plan: StepPlan, step: int) -> Update | None:
        """Driver, before the rollouts: rows of the step's update whose gradient no rollout changes; None: no such rows.

        They have no POLICY token, `assemble` returns the same rows under the same loss and coefficients, and no
        component has a denominator that counts them together with others.
        """
        ...

    def follow_up(
        self, rounds: Sequence[Sequence[RolloutGroup]], step: int, draw: DrawFn
    ) -> Sequence[RolloutRequest]:
        """Driver, after each round of rollouts: what to roll out next; nothing ends the step's rollouts.

        `rounds` holds the scored groups of every round so far (at least one), in the order they were asked for.
        """
        ...

    def assemble(
        self, plan: StepPlan, groups: Sequence[RolloutGroup], step: int
    ) -> Sequence[Update]:
        """Driver, numpy: rows with source, advantage and weight per token; coefficients of this step.

        `groups` are those of all rounds, one round after the other; a prompt has one group a round that asked for it.
        """
        ...

    def finish(self, batch: TrainBatch) -> TrainBatch:
        """Driver, after the no-grad pass: what needs whole-batch log-probs, entropy or values."""
        ...

    def prepare(
        self, batch: TrainBatch, logprobs: Tensor | None, coefs: Mapping[str, float]
    ) -> TrainBatch:
        """Driver, once for each minibatch just before its optimizer step: statistics over all of it.

        Changes no state: gradients that are only measured pass through here too.
        """
        ...

    def remember(self, batch: TrainBatch) -> None:
        """Driver, once for each minibatch just after its optimizer step: keep what `prepare` found out."""
        ...

    def observe(self, report: UpdateReport) -> None:
        """Driver: feed gradient norms or metrics of an optimizer step back into the algorithm's state.

        Steps that were left out because something was not finite are not reported.
        """
        ...

    def metrics(self) -> Mapping[str, float]:
        """State worth logging each step (gates, buffer sizes, coefficients)."""
        ...

    def ledger(self, updates: Sequence[Update], step: int) -> ExpertLedger:
        """Driver, after the step's updates: the expert's part in the step."""
        ...

    def probes(self, updates: Sequence[Update], step: int) -> Mapping[str, Update]:
        """Driver, before the step's first update: gradients to measure at the present weights, by name.

        Each is that of all rows of the Update named, as one minibatch, and nothing of it is applied.
        """
        ...

    def observe_gradients(self, comparison: GradientComparison) -> None:
        """Driver: what `probes` asked for, before the step's first update."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state for the checkpoint."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class DataSource(Protocol):
    """Endless, deterministic streams of prompts whose position is a number."""

    eval_prompts: Sequence[Prompt]

    def take(self, n: int) -> Sequence[Prompt]:
        """The next n rollout prompts."""
        ...

    def take_experts(self, n: int) -> Sequence[Prompt]:
        """The next n prompts of the expert stream; each has at least one demonstration."""
        ...

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        """Scored rollouts of all rounds of a step: what the choice of later prompts may depend on."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """What the source knows of its prompts by now; nothing where their choice does not depend on rollouts."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class RolloutPool(Protocol):
    """Rollout workers behind one door."""

    def generate(
        self, requests: Sequence[RolloutRequest], *, step: int
    ) -> Generator[Rollout, None, None]:
        """Yield every requested rollout once, as it finishes; `step` only enters the seeds.

        Those that a request says are finished come first, begun ones go on from their last token. Closing the
        generator early aborts what is in flight.
        """
        ...

    def interrupt(self) -> Sequence[Rollout]:
        """End the `generate` that is under way: what finished meanwhile, and unfinished samples as far as they came.

        The latter have finish_reason "abort"; a sample without a token is left out.
        """
        ...

    def receivers(self) -> Sequence[Any]:
        """Handles that the learner sends weights to: the workers that are up now, at least one."""
        ...

    def prove(
        self, version: int, probes: Sequence[Sequence[int]], receivers: Sequence[Any]
    ) -> Sequence[ServedProof]:
        """What each of the receivers serves: version, checksums by parameter, log-probs of the probe sequences.

        One that was lost since `receivers` named it is left out.
        """
        ...

    def admit(
        self, version: int, receivers: Sequence[Any], sync: Callable[[Sequence[Any]], object]
    ) -> None:
        """These are proved to serve `version`, and from now on nobody draws samples who is not.

        `sync(receivers)` brings workers that start later to the same version and admits them; it raises WorkerLost
        when none of them lives to the end. The pool calls it only from within `generate`.
        """
        ...

    def status(self) -> Sequence[Mapping[str, Any]]:
        """What each worker does now, and what it was asked for longest ago; callable from any thread."""
        ...

    def close(self) -> None: ...


class ServedProof(Protocol):
    """One worker's evidence after a weight sync."""

    @property
    def worker(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def checksums(self) -> Mapping[str, str]:
        """Digest of each received parameter as the learner names it."""
        ...

    @property
    def stale(self) -> Sequence[str]:
        """Parameters whose served (possibly repacked) copy does not compute what was received."""
        ...

    @property
    def logprobs(self) -> Sequence[Sequence[float]]:
        """Of tokens 1.. of each probe sequence."""
        ...


class Scorer(Protocol):
    """Reward functions behind killable processes."""

    def score(
        self,
        requests: Sequence[RolloutRequest],
        rollouts: Iterable[Rollout],
        earlier: Sequence[RolloutGroup] = (),
        *,
        num_groups: int | None = None,
    ) -> Sequence[RolloutGroup]:
        """Score rollouts while they stream in; one group a distinct prompt, in request order.

        `num_groups`: so many prompts come, each of them complete; None: all.
        `earlier`: groups of the step's earlier rounds, which share its budget of UNKNOWN scores.
        """
        ...

    def grade(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """The same prompts, every demonstration with a score: its own, or the verdict on its text."""
        ...

    def close(self) -> None: ...


class Learners(Protocol):
    """Learner ranks behind one door."""

    def annotate(
        self, batch: TrainBatch, needs: frozenset[Need], *, single: bool, loss: str | None = None
    ) -> TrainBatch:
        """No-grad pass that fills the declared columns.

        `single` says that one optimizer step consumes the whole batch, so old log-probs equal the current ones. `loss`:
        the one that will read them; rows that have no gradient under it (`Algorithm.advantage_only`, with the
        advantages of `assemble`) may be left out.
        """
        ...

    def refresh_reference(self) -> None:
        """Make the frozen reference a copy of the current weights (an Update's `refresh_reference`)."""
        ...

    def update(
        self,
        batch: TrainBatch,
        update: Update,
        *,
        step: int,
        prepare: PrepareFn | None = None,
        remember: RememberFn | None = None,
    ) -> Sequence[UpdateReport]:
        """Minibatches x epochs optimizer steps; `prepare` sees each whole minibatch first, `remember` last."""
        ...

    def begin(self, batch: TrainBatch, update: Update) -> None:
        """Add the gradient of rows (`Algorithm.first_rows`) to that of the next update, which leaves them out.

        That update must be one optimizer step, and hold the same rows; LearnerError where it does not.
        """
        ...

    def compare_gradients(
        self, probes: Sequence[GradientProbe], *, step: int, prepare: PrepareFn | None = None
    ) -> GradientComparison:
        """Gradients of the current weights, each over its whole batch as one minibatch; nothing is applied."""
        ...

    def connect(self, receivers: Sequence[Any]) -> None:
        """Tell the learner where to send weights."""
        ...

    def send_weights(self, version: int) -> Mapping[str, str]:
        """Deliver the current weights to every receiver that lives; return the checksum of each parameter."""
        ...

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> Sequence[Sequence[float]]:
        """Log-probs of tokens 1.. of each sequence under the current policy."""
        ...

    def save(self, folder: str) -> None:
        """Begin to write the state into a new folder; training may go on at once."""
        ...

    def saved(self, *, wait: bool) -> Sequence[FileRecord] | None:
        """The files of the last `save`, or None while they are being written; raises CheckpointError."""
        ...

    def load(self, paths: Sequence[str]) -> None:
        """Take over the state in these verified files, whatever number of ranks wrote them."""
        ...

    def export(self, folder: str) -> None:
        """Write safetensors that transformers and vLLM load."""
        ...

    def restart(self) -> None:
        """After LearnerLost: end what is left of the ranks and start them afresh, without state or receivers."""
        ...

    def status(self) -> Sequence[Mapping[str, Any]]:
        """What each rank does now; callable from any thread."""
        ...

    def close(self) -> None: ...
