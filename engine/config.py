"""The recipe's `loop`, `learner`, `eval` and `checkpoint` sections.

Defaults are the vetted setting. Models are frozen, unknown keys are errors, and no validator ever assigns.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator


class Section(BaseModel):
    """Base of every part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class LoopConfig(Section):
    steps: int = Field(ge=1)
    """Loop steps of the whole run; what schedules are laid over, also where a limit below ends the run before."""
    max_trained_tokens: int | None = Field(default=None, ge=1)
    """The run ends after the step that reaches this many trained tokens, policy and expert; null: no limit."""
    max_seconds: float | None = Field(default=None, gt=0)
    """The run ends after the step that reaches this time, evaluation and checkpoints left out; null: no limit."""
    prompts_per_step: int = Field(default=128, ge=1)
    """Prompts drawn each step; each is rolled out `algorithm.rollouts_per_prompt` times or trains its demonstration."""
    prompts_per_minibatch: int | None = Field(default=None, ge=1)
    """Prompts of one optimizer step; must divide prompts_per_step. null: the whole step is one minibatch."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the step's rows."""
    staleness: Literal[0, 1] = 0
    """Updates that the weights may take between a rollout and the update that trains it. 1: the next step is sampled
    while this one trains, but not across a checkpoint or an evaluation; needs `algorithm.sampler_ratio_cap`."""
    extra_prompts: int = Field(default=0, ge=0)
    """Over-sampling: prompts rolled out beyond prompts_per_step. A step trains the first prompts_per_step of which all
    rollouts are complete; the others go on in the next one. Needs `algorithm.sampler_ratio_cap`."""
    save_batch_every: int = Field(default=0, ge=0)
    """Each so many steps, write the step's prompts, demonstrations and scored rollouts to batches/ for `plait ask`. 0:
    never."""
    gradient_every: int = Field(default=0, ge=0)
    """Each so many steps, measure the gradients of expert and policy tokens apart, before the step's updates, for the
    metrics ledger/*gradient*; costs one more forward and backward pass of each source. 0: never."""

    max_restarts: int = Field(default=5, ge=0)
    """Restarts of a lost learner in one run of the program, from the last checkpoint and the journal; then it ends."""
    stall_seconds: float = Field(default=3600.0, gt=0)
    """The run ends, and names what it waits for, when nothing at all has moved for so long."""

    @model_validator(mode="after")
    def _minibatch_divides(self) -> "LoopConfig":
        per_minibatch = self.prompts_per_minibatch
        if per_minibatch is not None and self.prompts_per_step % per_minibatch:
            raise ValueError(
                f"loop.prompts_per_minibatch = {per_minibatch} does not divide "
                f"loop.prompts_per_step = {self.prompts_per_step}; choose a divisor"
            )
        return self

    @model_validator(mode="after")
    def _extra_prompts_fit(self) -> "LoopConfig":
        if self.extra_prompts > self.prompts_per_step:
            raise ValueError(
                f"loop.extra_prompts = {self.extra_prompts} is more than loop.prompts_per_step = "
                f"{self.prompts_per_step}: a prompt would wait for several steps; lower it"
            )
        if self.extra_prompts and self.staleness:
            raise ValueError(
                f"loop.extra_prompts = {self.extra_prompts} leaves samples for the next step, which loop.staleness = 1 "
                "has sampled by then; set one of them to 0"
            )
        return self

    @property
    def minibatches(self) -> int:
        """Optimizer steps of one pass over a step's rows."""
        return self.prompts_per_step // (self.prompts_per_minibatch or self.prompts_per_step)


class HalfConfig(Section):
    type: Literal["half"]
    fraction: float = Field(default=0.5, gt=0, lt=1)
    """Share of the tensors that is frozen, in each block of layers."""
    redraw_steps: int = Field(default=100, ge=1)
    """Optimizer steps until others are drawn."""


class GradientMagnitudeConfig(Section):
    type: Literal["gradient_magnitude"]
    keep_fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of each tensor that a step changes: the entries with the largest accumulated gradient."""


class PrincipalWeightsConfig(Section):
    type: Literal["principal_weights"]
    rank: int = Field(default=128, ge=1)
    """Of the approximation whose largest entries are trained."""
    keep_fraction: float = Field(default=0.05, gt=0, le=1)
    """Share of each matrix that is trained."""
    refresh_steps: int = Field(default=200, ge=1)
    """Optimizer steps until the entries are chosen anew."""


class PatternConfig(Section):
    type: Literal["pattern"]
    trainable: list[str] = []
    """Names of trained parameters, with * for any text: `model.layers.*.mlp.*`."""
    neurons: dict[str, list[int]] = {}
    """Trained rows of parameters: name, with * for any text, to row numbers."""

    @model_validator(mode="after")
    def _trains_something(self) -> "PatternConfig":
        if not self.trainable and not self.neurons:
            raise ValueError("trains nothing; name parameters in trainable or neurons")
        return self


class LoraConfig(Section):
    type: Literal["lora"]
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    targets: Literal["all-linear"] | list[str] = "all-linear"
    train_a: bool = True
    """false: only B of the update B A is trained."""


ParameterSelection = Annotated[
    HalfConfig | GradientMagnitudeConfig | PrincipalWeightsConfig | PatternConfig | LoraConfig,
    Field(discriminator="type"),
]


class LearnerConfig(Section):
    num_workers: int = Field(default=1, ge=1)
    """Data-parallel DeepSpeed ranks."""
    device: Literal["cpu", "cuda"] = "cpu"
    num_cpus: int = Field(default=2, ge=1)
    """Threads of one rank."""
    resources: dict[str, PositiveFloat] = Field(default={})
    """Custom Ray resources that each rank claims: where the ranks may live, for example `{learner_node: 1}`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights of the forward pass; master weights and losses are float32 whatever this is."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: bool = False
    """ZeRO 1-3: keep optimizer state in host memory (DeepSpeedCPUAdam)."""
    learning_rate: float = Field(default=1e-6, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay to zero over loop.steps after the warm-up; a function of the completed loop steps only."""
    warmup_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of loop.steps over which the learning rate rises linearly from zero."""
    betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this L2 norm; the norm before clipping is what metrics report."""
    max_skipped_updates: int = Field(default=3, ge=1)
    """Optimizer steps in a row that are left out because their loss or gradient is not finite, until the run stops."""
    max_tokens_per_micro_batch: int = Field(default=4096, ge=1)
    """Token budget of one forward pass; rows are packed into it and never split."""
    packing: bool = True
    """false: one padded row per sequence and plain attention (same gradients; slower, for comparison)."""
    share_prefixes: bool = True
    """Tokens that rows of a micro-batch begin with are computed once (same gradients). With segment attention: on the
    CPU, or with learner.attention = segments."""
    logit_chunk_tokens: int = Field(default=512, ge=1)
    """Logits exist for at most this many tokens at a time."""
    gradient_checkpointing: bool = False
    attention: Literal["auto", "segments", "flash_attention_2"] = "auto"
    """auto: flash_attention_2 on CUDA where flash-attn is installed, else plait's segment attention."""
    parameter_selection: ParameterSelection | None = None
    """Which parameters the optimizer may change (docs/parameter-selection.md); null: all."""
    timeout_seconds: float = Field(default=1800.0, gt=0)
    """Deadline of every call to a learner rank and of every collective."""
    silence_seconds: float = Field(default=60.0, gt=0)
    """A rank whose process does not answer for so long is taken for stuck; a dead one is noticed at once."""
    place_seconds: float = Field(default=300.0, gt=0)
    """Longest wait for a place in the cluster when the ranks start again and their node was lost."""
    num_spares: int = Field(default=0, ge=0)
    """CPU: processes that wait, everything imported, to become ranks when the learner restarts."""

    @model_validator(mode="after")
    def _zero_holds_master_weights(self) -> "LearnerConfig":
        if self.zero_stage == 0 and (self.offload_optimizer or self.dtype == "bfloat16"):
            key = "offload_optimizer = true" if self.offload_optimizer else "dtype = bfloat16"
            raise ValueError(
                f"learner.{key} needs learner.zero_stage of 1, 2 or 3 (it is 0): "
                "ZeRO holds the float32 master weights"
            )
        return self

    @model_validator(mode="after")
    def _spares_own_no_gpu(self) -> "LearnerConfig":
        if self.num_spares and self.device == "cuda":
            raise ValueError(
                f"learner.num_spares = {self.num_spares}: a rank owns its GPU from its start, so spares work with "
                "learner.device = cpu only"
            )
        return self

    @property
    def shares_prefixes(self) -> bool:
        segments = self.device == "cpu" or self.attention == "segments"
        return self.share_prefixes and self.packing and segments

    @property
    def adapters(self) -> LoraConfig | None:
        chosen = self.parameter_selection
        return chosen if isinstance(chosen, LoraConfig) else None

    @property
    def masks_updates(self) -> bool:
        """True where entries of trained parameters may be frozen."""
        chosen = self.parameter_selection
        if isinstance(chosen, PatternConfig):
            return bool(chosen.neurons)
        return chosen is not None and self.adapters is None


class EvalConfig(Section):
    num_prompts: int = Field(default=128, ge=0)
    """Prompts held out of the training data, never trained on; 0: none. Without them and without data.eval_sets there
    is no evaluation."""
    every: int = Field(default=0, ge=0)
    """Evaluate each so many steps; 0: only before the first and after the last step."""
    temperature: float = Field(default=0.0, ge=0)
    rollouts_per_prompt: int = Field(default=1, ge=1)
    max_response_length: int | None = Field(default=None, ge=1)
    """null: rollouts.max_response_length."""


class CheckpointConfig(Section):
    every: int = Field(default=0, ge=0)
    """Write a checkpoint each so many steps; 0: only after the last step. One is also written after each evaluation
    that is the best so far."""
    keep: int = Field(default=2, ge=2)
    """Newest checkpoints kept, and beside them the best of those that were evaluated. At least 2: where one is damaged,
    the one before it is used."""
