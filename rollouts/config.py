"""The recipe's `rollouts` and `data` sections."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..engine.config import Section
from .admission_policy import AdmissionConfig


class RolloutConfig(Section):
    num_workers: int = Field(default=1, ge=1)
    """vLLM engines, each in its own Ray actor."""
    device: Literal["cpu", "cuda"] = "cpu"
    num_cpus: int = Field(default=2, ge=1)
    """Threads of one engine."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs of one engine."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """null: as the learner."""
    max_prompt_length: int = Field(default=1024, ge=1)
    max_response_length: int = Field(default=1024, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_num_seqs: int = Field(default=64, ge=1)
    """Sequences one engine decodes together; the pool keeps no more than twice as many at a worker."""
    kv_cache_gib: float = Field(default=2.0, gt=0)
    """CPU: memory of the KV cache."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)
    """CUDA: share of GPU memory the engine may take."""
    enforce_eager: bool = True
    """false: compile the model (slower start, faster decoding on GPUs)."""
    weight_sync: Literal["shared_memory", "nccl", "ipc"] = "shared_memory"
    """shared_memory on one CPU node; nccl between separate GPUs; ipc where learner and rollouts share a GPU."""
    start_timeout_seconds: float = Field(default=600.0, gt=0)
    sample_timeout_seconds: float = Field(default=600.0, gt=0)
    """Deadline of the wait for the next finished sample."""
    sync_timeout_seconds: float = Field(default=300.0, gt=0)

    @model_validator(mode="after")
    def _ipc_shares_one_gpu(self) -> "RolloutConfig":
        if self.weight_sync == "ipc" and self.tensor_parallel_size > 1:
            raise ValueError(
                f"rollouts.tensor_parallel_size = {self.tensor_parallel_size} does not work with "
                "rollouts.weight_sync = ipc, where learner and rollouts share one GPU; use nccl"
            )
        return self

    @property
    def gpu_share(self) -> float:
        """What learner and rollouts each claim of a GPU: half where they share one."""
        return 0.5 if self.weight_sync == "ipc" else 1.0


class DataSection(Section):
    """Fields of every kind of data set."""

    seed: int = 0
    """Orders prompts and draws the held-out split; independent of run.seed."""
    system_prompt: str | None = None
    prompt_template: str = "{prompt}"
    """Wrapped around each prompt text; `{prompt}` stands for it."""
    demonstration_template: str = "{demonstration}"
    """Wrapped around each demonstration text; `{demonstration}` and `{answer}` stand for the columns."""
    hint_template: str = "{prompt}\n\nA solution may begin like this:\n\n{hint}"
    """The user's turn where a method shows a hint: `{prompt}` stands for the turn without it."""
    admission: AdmissionConfig = AdmissionConfig()


class Columns(Section):
    """Which column holds what; dots look inside a cell: `reward_model.ground_truth`, `target.0.content`."""

    prompt: str = "prompt"
    """Text of the user's turn."""
    messages: str = "messages"
    """Used instead of `prompt` where present: a list of {role, content}."""
    answer: str = "answer"
    demonstration: str = "demonstration"
    """A text or a list of texts."""
    rejected: str = "rejected"
    """A text or a list of texts that pairwise expert losses hold against the first demonstration; taken as they are,
    without `demonstration_template`."""
    demonstration_score: str = "demonstration_score"
    """The demonstration's reward: a number, or a list with one (or null) for each of the texts."""
    token_weights: str = "token_weights"
    """Numbers for the tokens of the demonstration, end token included, or a list of such lists for a list of texts.
    A token of weight 0 is not trained. So are the columns below; docs/expert-losses.md says who reads them."""
    base_logprobs: str = "base_logprobs"
    ref_logprobs: str = "ref_logprobs"
    history_logprobs: str = "history_logprobs"
    behaviour_logprobs: str = "behaviour_logprobs"
    """Log-probs of the policy that wrote the demonstration."""
    prompt_attention: str = "prompt_attention"
    """Attention mass from each token to the prompt, between 0 and 1."""
    reward: str = "reward"
    """Name of the row's reward; absent: the recipe's `reward`."""
    metadata: str = "metadata"
    id: str = "id"


class ReasoningGymData(DataSection):
    type: Literal["reasoning_gym"]
    dataset: str
    """Name in reasoning-gym's registry, for example chain_sum."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that data set's own config."""
    size: int = Field(default=2000, ge=1)
    """Training problems generated; problems equal to a held-out one are left out."""
    demonstrations: Literal["answer", "solution", "none"] = "answer"
    """answer: the item's answer; solution: its written solution (`metadata["answer_cot"]`), where it has one."""


class JsonlData(DataSection):
    type: Literal["jsonl"]
    path: str
    columns: Columns = Columns()
    max_rows: int | None = Field(default=None, ge=1)


class HuggingFaceData(DataSection):
    type: Literal["huggingface"]
    path: str
    """Hub id, or a local folder or file that `datasets.load_dataset` reads."""
    name: str | None = None
    split: str = "train"
    columns: Columns = Columns()
    max_rows: int | None = Field(default=None, ge=1)


DataConfig = Annotated[ReasoningGymData | JsonlData | HuggingFaceData, Field(discriminator="type")]
