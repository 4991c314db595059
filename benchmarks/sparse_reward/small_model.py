"""A Llama of one million random weights that reads and writes letter by letter.

    python small_model.py models/small

The comparison of docs/compare.md starts from it after a warm-up on short words (warm.yaml). The same
command always writes the same weights.
"""

from __future__ import annotations

import string
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, START, END, UNKNOWN = "<pad>", "<start>", "<end>", "<unknown>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<start>' + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character, or a lower-case letter with the line end behind it."""
    closed = [f"{letter}\n" for letter in string.ascii_lowercase]
    vocabulary = [PAD, START, END, UNKNOWN, *string.printable, *closed]
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]\n|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[START],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """4 layers, hidden size 128, float32."""
    torch.manual_seed(0)
    ends: Any = tokenizer.eos_token_id
    pads: Any = tokenizer.pad_token_id
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=ends,
            pad_token_id=pads,
        )
    )


def main(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    make_model(tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
