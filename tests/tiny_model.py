"""Tiny random Hugging Face checkpoints with a working tokenizer, made in code in milliseconds.

`make_tiny_model(folder)` writes config.json, generation_config.json, model.safetensors and a
byte-level BPE tokenizer with a ChatML template (`<|im_start|>role\\n...<|im_end|>\\n`), whose
end-of-sequence token is `<|im_end|>`. The same arguments always give the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"]
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")

# Transformers' Qwen2 tokenizer adds "<|endoftext|>" where it is missing, so it is the pad token.
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CORPUS = [
    "system user assistant You are a helpful assistant. Answer with a number.",
    "What is 2 + 2? The answer is 4. 12 + 30 = 42, 7 - 3 = 4, 10 * 10 = 100.",
    "State the final answer to the following arithmetic problem: 9 + 4 - 1 =",
    "Put the answer in \\boxed{42}. Let us think step by step. First, second, third.",
    "Calculate the following: one two three four five six seven eight nine ten.",
]


def make_tiny_tokenizer(folder: str | Path, vocab_size: int = 320) -> Any:
    """Train and save the tokenizer; the number of tokens is exactly `vocab_size` (at least 259)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 259:
        raise ValueError(f"vocab_size = {vocab_size}: 256 bytes and 3 special tokens need 259")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    missing = vocab_size - tokenizer.get_vocab_size()
    # The corpus holds a limited number of merges; fill up with tokens that no text yields.
    tokenizer.add_tokens([f"<unused{i}>" for i in range(missing)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def tiny_config(
    family: Family,
    *,
    vocab_size: int,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    tied: bool,
    eos: int,
    pad: int,
) -> Any:
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "initializer_range": 0.1,
    }
    if family == "llama":
        return transformers.LlamaConfig(**shape)
    if family == "mistral":
        return transformers.MistralConfig(**shape, sliding_window=None)
    if family == "qwen2":
        shape.pop("head_dim")
        return transformers.Qwen2Config(**shape)
    if family == "qwen3":
        return transformers.Qwen3Config(**shape)
    if family == "gemma":
        return transformers.GemmaConfig(**shape)
    scale = hidden // heads
    if family == "gemma2":
        return transformers.Gemma2Config(**shape, query_pre_attn_scalar=scale, sliding_window=64)
    if family == "gemma3":
        return transformers.Gemma3TextConfig(
            **shape, query_pre_attn_scalar=scale, sliding_window=64
        )
    raise ValueError(f"family = {family!r}: choose one of {', '.join(FAMILIES)}")


def make_tiny_model(
    folder: str | Path,
    family: Family = "llama",
    tied: bool = True,
    vocab_size: int = 320,
    hidden: int = 64,
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
) -> Path:
    """Write a float32 checkpoint and its tokenizer into `folder`; returns the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tiny_tokenizer(folder, vocab_size)
    config = tiny_config(
        family,
        vocab_size=vocab_size,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        tied=tied,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomise_vectors(model)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id})
    )
    return folder


def randomise_vectors(model: Any) -> None:
    """Move norm weights and biases off their initial 1 or 0: a parity test then sees each."""
    import torch

    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
