"""A causal language model from transformers, seen as a function from rows to log-probs of their tokens.

The LM head runs only on positions whose next token is trained, in chunks that are recomputed in the backward pass
(head_statistics.py where it is one matrix and only log-probs and entropy are wanted): logits of a whole micro-batch
never exist at once. Softmax and everything after it is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

from .attention import SEGMENTS, hidden_states
from .batch import from_sequences
from .config import LearnerConfig, PatternConfig
from .errors import LearnerError
from .head_statistics import has_plain_head, head_statistics
from .parameter_selection import freeze_unmatched
from .row_sketch import sketch_rows
from .token_samples import draw, expected_sums, sampled_sums, uniforms
from .types import PolicyOutput, TokenSamples, TokenSampling, TrainBatch

if TYPE_CHECKING:
    from .contracts import Need

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEAD_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Largest difference between PolicyModel's log-probs and the plain model's, in nats."""


def token_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each distribution: logits [n, V], targets [n] -> two [n].

    float32 for half-precision logits, float64 for float64 ones.
    """
    logits = _wide(logits)
    log_normalizer = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_normalizer
    return logprobs, entropy_of(logits, log_normalizer)


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """As token_statistics, without the entropy."""
    logits = _wide(logits)
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def entropy_of(logits: Tensor, log_normalizer: Tensor) -> Tensor:
    """-sum p log p over the vocabulary: [n, V], [n] -> [n]; with gradient."""
    probabilities = (logits - log_normalizer[:, None]).exp()
    return log_normalizer - (probabilities * logits).sum(-1)


def full_kl(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor]:
    """KL(ref || pi) and KL(pi || ref) over the vocabulary: [n, V] each -> two [n]; no gradient into `ref_logits`."""
    policy, ref = _wide(logits).log_softmax(-1), _wide(ref_logits.detach()).log_softmax(-1)
    gap = policy - ref
    return -(ref.exp() * gap).sum(-1), (policy.exp() * gap).sum(-1)


def topk_entropy(logits: Tensor, top_k: int) -> Tensor:
    """Entropy of the softmax over the `top_k` largest logits: [n, V] -> [n], a constant."""
    largest = _wide(logits.detach()).topk(min(top_k, logits.shape[-1])).values.log_softmax(-1)
    return -(largest.exp() * largest).sum(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class HeadOutput(NamedTuple):
    """float32 [T] each, 0 on tokens that are not trained; None where it was not asked for.

    Plain tensors, because DeepSpeed's hooks look for them in the output.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    hit_rate: Tensor | None = None
    hit_logprobs: Tensor | None = None
    miss_logprobs: Tensor | None = None
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    topk_entropy: Tensor | None = None

    def to_policy_output(self, vocabulary: int) -> PolicyOutput:
        samples = None
        if self.hit_rate is not None:
            assert self.hit_logprobs is not None
            assert self.miss_logprobs is not None
            samples = TokenSamples(self.hit_rate, self.hit_logprobs, self.miss_logprobs)
        return PolicyOutput(
            self.logprobs,
            self.entropy,
            samples=samples,
            forward_kl=self.forward_kl,
            reverse_kl=self.reverse_kl,
            topk_entropy=self.topk_entropy,
            vocabulary=vocabulary,
        )


class PolicyModel(nn.Module):
    """Token log-probs of packed rows, and what else losses need of each position's distribution.

    `reference` gives the other side of `ref_kl`; it is no submodule, so no optimizer and no checkpoint sees it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        packing: bool,
        logit_chunk_tokens: int,
        token_sampling: TokenSampling | None = None,
        entropy_top_k: int | None = None,
        reference: PolicyModel | None = None,
    ) -> None:
        super().__init__()
        self.token_sampling = token_sampling
        self.entropy_top_k = entropy_top_k
        self._references: list[PolicyModel] = [] if reference is None else [reference]
        self.model = model
        self.packing = packing
        self.logit_chunk_tokens = logit_chunk_tokens
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self.hidden_grads: list[Tensor] = []
        self.keeps_hidden = False
        """True: the next forward pass leaves what predicts its trained tokens for `sketch_rows`."""
        self._hidden: Tensor | None = None

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        config: Any = self.model.config
        return config.get_text_config().vocab_size

    def forward(self, batch: TrainBatch, wanted: frozenset[Need] = frozenset()) -> HeadOutput:
        """Columns of the packed rows. At least one position always goes through the head.

        `wanted`: entropy, token_samples, ref_kl, topk_entropy; the rest of a loss's needs is ignored.
        """
        targets = batch.trained.nonzero().squeeze(-1)
        if len(targets) == 0:
            targets = torch.ones(1, dtype=torch.long, device=batch.input_ids.device)
        hidden = hidden_states(self.model.base_model, batch, targets - 1, packing=self.packing)
        if hidden.requires_grad:
            hidden.register_hook(self._keep_hidden_grad)
        if self.keeps_hidden:
            self._hidden, self.keeps_hidden = hidden.detach(), False
        inputs = {"hidden": hidden, "tokens": batch.targets[targets]}
        flat = self._fused(wanted, inputs) or self._chunked(wanted, batch, targets, inputs)
        return HeadOutput(
            **{
                name: column.new_zeros(batch.num_tokens).index_copy(0, targets, column)
                for name, column in flat.items()
            }
        )

    def _fused(self, wanted: frozenset[Need], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Log-probs and entropy [n], where nothing else is wanted of a head that is one matrix; else nothing."""
        if wanted & {"token_samples", "ref_kl", "topk_entropy"} or not has_plain_head(self.model):
            return {}
        logprobs, entropy = head_statistics(
            inputs["hidden"],
            self.model.get_output_embeddings().weight,
            inputs["tokens"],
            softcap=self.softcap,
            chunk_tokens=self.logit_chunk_tokens,
            entropy="entropy" in wanted,
        )
        return {"logprobs": logprobs} | ({} if entropy is None else {"entropy": entropy})

    def _chunked(
        self,
        wanted: frozenset[Need],
        batch: TrainBatch,
        targets: Tensor,
        inputs: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Columns [n] of everything wanted; each chunk is recomputed in the backward pass."""
        if "token_samples" in wanted:
            if batch.row_seeds is None:
                raise LearnerError("token samples need row seeds")
            inputs["seeds"] = batch.row_seeds[batch.row_ids[targets]]
            inputs["positions"] = batch.position_ids[targets]
        if "ref_kl" in wanted:
            body = self._references[0].model.base_model
            with torch.no_grad():
                inputs["ref_hidden"] = hidden_states(body, batch, targets - 1, packing=self.packing)
        split = {name: column.split(self.logit_chunk_tokens) for name, column in inputs.items()}
        results: list[dict[str, Tensor]] = []
        for i in range(len(split["hidden"])):
            chunk = {name: parts[i] for name, parts in split.items()}
            if torch.is_grad_enabled():
                result = checkpoint(self._head, wanted, chunk, use_reentrant=False)
            else:
                result = self._head(wanted, chunk)
            results.append(result)
        return {name: torch.cat([result[name] for result in results]) for name in results[0]}

    def sketch_rows(self, batch: TrainBatch, zero_stage: int) -> dict[str, Tensor]:
        """`logit_norms` and `logit_sketches` of the rows that `forward` has just seen. Collective under ZeRO-3."""
        import deepspeed

        assert self._hidden is not None, "set keeps_hidden before the forward pass"
        hidden, self._hidden = self._hidden, None
        head = self.model.get_output_embeddings()
        lengths = batch.row_ids[batch.trained].bincount(minlength=batch.num_rows).tolist()
        with deepspeed.zero.GatheredParameters(list(head.parameters()), enabled=zero_stage == 3):
            norms, sketches = sketch_rows(hidden, lengths, head, self.softcap)
        return {"logit_norms": norms, "logit_sketches": sketches}

    def check_head(self) -> None:
        """Compare with the plain model on one sequence: some architectures scale their logits in ways of their own.

        Raises LearnerError naming the model type and the difference.
        """
        config: Any = self.model.config
        device = next(self.model.parameters()).device
        ids = torch.arange(3, 35, device=device) % config.vocab_size
        batch = from_sequences([ids.tolist()]).to(device)
        rows = {"row_lengths": [len(ids)]} if config._attn_implementation == SEGMENTS else {}
        with torch.no_grad():
            ours = self(batch).logprobs
            logits = self.model(input_ids=ids[None], use_cache=False, **rows).logits[0]
            difference = (ours[1:] - token_logprobs(logits[:-1], ids[1:])).abs().max().item()
        if not difference <= HEAD_TOLERANCE[logits.dtype]:
            raise LearnerError(
                f"model type {config.model_type!r}: plait's chunked LM head gives log-probs that differ by "
                f"{difference:.3g} from the model's own; this architecture is not supported"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, V]."""
        logits = self.model.get_output_embeddings()(hidden)
        if self.softcap is not None:
            logits = torch.tanh(logits.float() / self.softcap) * self.softcap
        return logits

    def _head(self, wanted: frozenset[Need], chunk: dict[str, Tensor]) -> dict[str, Tensor]:
        """One column [n] for each field of HeadOutput that is wanted."""
        logits, tokens = self.logits(chunk["hidden"]), chunk["tokens"]
        columns: dict[str, Tensor] = {}
        if "entropy" in wanted:
            columns["logprobs"], columns["entropy"] = token_statistics(logits, tokens)
        else:
            columns["logprobs"] = token_logprobs(logits, tokens)
        if "token_samples" in wanted:
            sums = self._sample(logits, tokens, chunk["seeds"], chunk["positions"])
            columns["hit_rate"], columns["hit_logprobs"], columns["miss_logprobs"] = sums
        if "ref_kl" in wanted:
            reference = self._references[0]
            with torch.no_grad():
                ref_logits = reference.logits(chunk["ref_hidden"])
            columns["forward_kl"], columns["reverse_kl"] = full_kl(logits, ref_logits)
        if "topk_entropy" in wanted:
            if self.entropy_top_k is None:
                raise LearnerError("topk_entropy needs the algorithm's entropy_top_k")
            columns["topk_entropy"] = topk_entropy(logits, self.entropy_top_k)
        return columns

    def _sample(
        self, logits: Tensor, tokens: Tensor, seeds: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        sampling = self.token_sampling
        if sampling is None:
            raise LearnerError("token_samples need the algorithm's token_sampling")
        if sampling.exact:
            return expected_sums(logits, tokens, sampling)
        chances = uniforms(seeds, positions, sampling.num_samples)
        samples = draw(logits.float(), chances, sampling.temperature)
        return sampled_sums(logits, tokens, samples, sampling)

    def _keep_hidden_grad(self, grad: Tensor) -> None:
        self.hidden_grads.append(grad)


def load_model(path: str, config: LearnerConfig) -> nn.Module:
    """The causal LM at `path`, in the learner's dtype, dropout off, with the recipe's adapters or frozen parameters."""
    attention = attention_implementation(config)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=DTYPES[config.dtype],
        attn_implementation=attention,
        use_safetensors=True,  # the other format is a pickle
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    lora = config.adapters
    if lora is not None:
        import peft

        adapters = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=lora.targets,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, adapters).get_base_model()
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(lora.train_a)
    if isinstance(config.parameter_selection, PatternConfig):
        freeze_unmatched(model, config.parameter_selection)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def attention_implementation(config: LearnerConfig) -> str:
    """Name under which transformers finds the attention function."""
    if not config.packing:
        return "eager"  # the plain formula, which every family supports: "sdpa" drops Gemma 2's soft cap
    if config.attention != "auto":
        return SEGMENTS if config.attention == "segments" else config.attention
    flash = config.device == "cuda" and is_flash_attn_2_available()
    return "flash_attention_2" if flash else SEGMENTS


def full_weights(model: nn.Module, zero_stage: int) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full detached tensor) of every weight, adapters merged. Collective under ZeRO-3."""
    import deepspeed

    def gathered(*parameters: Tensor):
        return deepspeed.zero.GatheredParameters(list(parameters), enabled=zero_stage == 3)

    merges = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", {}):
            merges[f"{name}.base_layer.weight"] = module
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        module = merges.get(name)
        adapters = list(module.parameters()) if module is not None else [parameter]
        with torch.no_grad(), gathered(*adapters):
            weight = parameter.detach()
            if module is not None:
                weight = weight + module.get_delta_weight("default").to(weight.dtype)
            # Under ZeRO-3 the gathered data is released when the context ends.
            weight = weight.clone() if zero_stage == 3 else weight
        yield name.replace(".base_layer.", "."), weight
