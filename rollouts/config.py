"""The recipe's `rollouts` section, and `data`: what rows are read, and how a run draws from them (docs/data.md)."""

import re
from collections import Counter
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from ..engine.config import Section
from ..engine.evaluation import HELD_OUT
from .admission_policy import AdmissionConfig


class RolloutConfig(Section):
    num_workers: int = Field(default=1, ge=1)
    """vLLM engines, each in its own Ray actor."""
    device: Literal["cpu", "cuda"] = "cpu"
    num_cpus: int = Field(default=2, ge=1)
    """Threads of one engine."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs of one engine, all on one node."""
    resources: dict[str, PositiveFloat] = Field(default={})
    """Custom Ray resources that each worker claims: where the workers may live."""
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
    """Deadline of a worker's start, and of the wait for a worker where none is left."""
    sample_timeout_seconds: float = Field(default=600.0, gt=0)
    """A worker that finishes none of the samples it was given for so long is replaced."""
    sync_timeout_seconds: float = Field(default=300.0, gt=0)
    silence_seconds: float = Field(default=60.0, gt=0)
    """A worker whose processes do not answer for so long is killed and replaced; a dead one is noticed at once."""
    num_spares: int = Field(default=0, ge=0)
    """CPU: workers that are started beside the others, and take the place of a lost one at once."""
    max_restarts: int = Field(default=3, ge=0)
    """Replacements in a row of one worker, none of which finished a sample; then it is given up."""
    max_reissues: int = Field(default=2, ge=0)
    """Times that a sample is asked for again because its worker was lost; then the run ends and names its prompt."""

    @model_validator(mode="after")
    def _ipc_shares_one_gpu(self) -> "RolloutConfig":
        if self.weight_sync == "ipc" and self.tensor_parallel_size > 1:
            raise ValueError(
                f"rollouts.tensor_parallel_size = {self.tensor_parallel_size} does not work with "
                "rollouts.weight_sync = ipc, where learner and rollouts share one GPU; use nccl"
            )
        return self

    @model_validator(mode="after")
    def _spares_own_no_gpu(self) -> "RolloutConfig":
        if self.num_spares and self.device == "cuda":
            raise ValueError(
                f"rollouts.num_spares = {self.num_spares}: a spare would hold GPUs without using them; raise "
                "rollouts.num_workers"
            )
        return self

    @property
    def gpu_share(self) -> float:
        """What learner and rollouts each claim of a GPU: half where they share one."""
        return 0.5 if self.weight_sync == "ipc" else 1.0


class ShuffledSampling(Section):
    """Epochs, each in another order."""

    type: Literal["shuffled"]


class DifficultySampling(Section):
    """Prompts near a success rate are drawn more often; the rate is that of the run's own rollouts."""

    type: Literal["difficulty"]
    target_rate: float = Field(default=0.5, gt=0, lt=1)
    """Share of correct rollouts at which a prompt is drawn most."""
    memory: float = Field(default=0.5, ge=0, lt=1)
    """Weight of the earlier groups in a prompt's running success rate; 0: the newest group alone."""
    min_weight: float = Field(default=0.05, gt=0, le=1)
    """Of prompts that are far from the target, against 1 at the target and for prompts never seen."""


class CurriculumSampling(Section):
    """From easy to hard, by the column `data.columns.difficulty`."""

    type: Literal["curriculum"]
    start: float = Field(default=0.2, gt=0, le=1)
    """Share of the rows, the easiest, that the first step draws from; it grows to all of them over loop.steps."""
    window: float | None = Field(default=None, gt=0, le=1)
    """Draw only from this share of the rows: the hardest of those reached. null: from all rows reached."""


SamplingConfig = Annotated[
    Annotated[
        ShuffledSampling | DifficultySampling | CurriculumSampling, Field(discriminator="type")
    ],
    BeforeValidator(lambda value: {"type": value} if isinstance(value, str) else value),
]
"""`sampling: curriculum` is short for `sampling: {type: curriculum}`."""


class FilterConfig(Section):
    """Prompts that teach nothing any more are not drawn."""

    solved_after: int | None = Field(default=None, ge=1)
    """Visits in a row with all rollouts correct until a prompt is retired; null: never."""
    hopeless_after: int | None = Field(default=None, ge=1)
    """Visits in a row with all rollouts wrong until a prompt is retired; null: never."""
    retry_every: int | None = Field(default=None, ge=1)
    """Epochs until a hopeless prompt is tried again; null: it stays retired."""

    @model_validator(mode="after")
    def _filters_something(self) -> "FilterConfig":
        if self.solved_after is None and self.hopeless_after is None:
            raise ValueError("filters nothing; set solved_after or hopeless_after, or leave it out")
        if self.retry_every is not None and self.hopeless_after is None:
            raise ValueError("retry_every concerns hopeless prompts; set hopeless_after too")
        return self


class WordsSection(Section):
    """How rows become conversations."""

    system_prompt: str | None = None
    prompt_template: str = "{prompt}"
    """Wrapped around each prompt text; `{prompt}` stands for it."""
    demonstration_template: str = "{demonstration}"
    """Wrapped around each demonstration text; `{demonstration}` and `{answer}` stand for the columns."""


class Columns(Section):
    """Which column holds what; dots look inside a cell: `reward_model.ground_truth`, `target.0.content`."""

    prompt: str = "prompt"
    """Text of the user's turn."""
    messages: str = "messages"
    """Used instead of `prompt` where present: a list of {role, content} with any number of turns, of the roles system,
    developer, user, assistant and tool. A last turn of the assistant is the demonstration."""
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
    difficulty: str = "difficulty"
    """A number, larger is harder: what `sampling: curriculum` orders by. Anything else counts as absent."""
    metadata: str = "metadata"
    id: str = "id"


class ReasoningGymRows(WordsSection):
    type: Literal["reasoning_gym"]
    dataset: str
    """Name in reasoning-gym's registry, for example chain_sum."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that data set's own config."""
    size: int = Field(default=2000, ge=1)
    """Training problems generated, and held in memory; problems equal to a held-out one are left out."""
    demonstrations: Literal["answer", "solution", "none"] = "answer"
    """answer: the item's answer; solution: its written solution (`metadata["answer_cot"]`), where it has one."""


class TableSection(WordsSection):
    """Rows that somebody wrote, with columns."""

    path: str
    columns: Columns = Columns()
    max_rows: int | None = Field(default=None, ge=1)
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """A row that cannot be read: refuse the data and list such rows, or drop them, counted by reason and written to
    quarantine.jsonl."""


class JsonlRows(TableSection):
    type: Literal["jsonl"]


class HuggingFaceRows(TableSection):
    type: Literal["huggingface"]
    path: str
    """Hub id, or a local folder or file (parquet, csv, tsv, json, jsonl, arrow) that `datasets` reads."""
    name: str | None = None
    split: str = "train"


FILE_KINDS = {
    "parquet": "parquet",
    "csv": "csv",
    "tsv": "tsv",
    "json": "json",
    "arrow": "arrow",
    "hf": "parquet",
}


def _refuse_file_kinds(value: Any) -> Any:
    """A file's suffix is a likely guess for `type`; the answer is one line."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in FILE_KINDS:
        raise ValueError(
            f"there is no type {kind!r}; did you mean `type: huggingface` with `path: ROWS.{FILE_KINDS[kind]}`?"
        )
    return value


RowsConfig = Annotated[
    Annotated[ReasoningGymRows | JsonlRows | HuggingFaceRows, Field(discriminator="type")],
    BeforeValidator(_refuse_file_kinds),
]


class EvalSet(Section):
    data: RowsConfig
    reward: str | None = None
    """Reward of the rows that name none; null: the recipe's."""


class DrawSection(Section):
    """How a run draws prompts, whatever they are read from."""

    seed: int = 0
    """Orders prompts and draws the held-out split; independent of run.seed."""
    hint_template: str = "{prompt}\n\nA solution may begin like this:\n\n{hint}"
    """The user's turn where a method shows a hint: `{prompt}` stands for the turn without it."""
    sampling: SamplingConfig = ShuffledSampling(type="shuffled")
    """Which training prompts come next; the expert stream is always shuffled."""
    filter: FilterConfig | None = None
    """null: every prompt is drawn for ever."""
    probe: str | None = None
    """rates.jsonl of `plait probe`: what the start model can do counts as a first visit of each prompt in it, for
    `sampling: difficulty`, for `filter`, and for `algorithm.skip_out_of_reach_steps`."""
    admission: AdmissionConfig = AdmissionConfig()
    eval_sets: dict[str, EvalSet] = Field(default={})
    """Data sets to evaluate on beside the held-out prompts, by name. All of their rows are asked."""

    @model_validator(mode="after")
    def _sets_have_names(self) -> "DrawSection":
        wrong = [name for name in self.eval_sets if not re.fullmatch(r"[\w.-]+", name)]
        if wrong or HELD_OUT in self.eval_sets:
            raise ValueError(
                f"eval_sets: {(wrong or [HELD_OUT])[0]!r} is no name for a set; use letters, digits, '_', '.' and '-', "
                f"and not {HELD_OUT}"
            )
        return self

    @property
    def observing(self) -> Literal["sampling", "filter"] | None:
        """The field that depends on how rollouts of the prompts went."""
        if isinstance(self.sampling, DifficultySampling):
            return "sampling"
        return None if self.filter is None else "filter"


class ReasoningGymData(ReasoningGymRows, DrawSection):
    pass


class JsonlData(JsonlRows, DrawSection):
    pass


class HuggingFaceData(HuggingFaceRows, DrawSection):
    pass


class MixturePart(Section):
    weight: float = Field(gt=0)
    """Share of the drawn prompts, against the other parts' weights."""
    data: RowsConfig
    name: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    """Begins the part's prompt ids and ends its metrics; null: the data set's or file's own name."""
    reward: str | None = None
    """Reward of the part's rows that name none; null: the recipe's."""

    @property
    def label(self) -> str:
        if self.name is not None:
            return self.name
        data = self.data
        return data.dataset if isinstance(data, ReasoningGymRows) else PurePath(data.path).stem


class MixtureData(DrawSection):
    type: Literal["mixture"]
    parts: list[MixturePart] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> "MixtureData":
        twice = [name for name, n in Counter(part.label for part in self.parts).items() if n > 1]
        if twice:
            raise ValueError(
                f"{len(twice)} names stand for several parts ({', '.join(twice)}); give each a `name`"
            )
        return self


DataConfig = Annotated[
    Annotated[
        ReasoningGymData | JsonlData | HuggingFaceData | MixtureData, Field(discriminator="type")
    ],
    BeforeValidator(_refuse_file_kinds),
]
