"""The packaged model: what is converted is what the GGUF file says, exactly, and it can talk.

The reference does not use transformers' GGUF loader: it reads the file with the `gguf` package,
names and un-permutes the tensors here, and compares every number.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plait.launch.model import PACKAGED, is_complete, materialize, open_gguf
from plait.rollouts.chat import ChatFormat, ControlTokenError

NAME = "smollm2-135m-instruct"

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
}


def hf_name(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    layer = f"layers.{parts[1]}." if parts[0] == "blk" else ""
    return f"model.{layer}{NAMES[parts[-1]]}.weight"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two halves of each head's rotary dimensions; Hugging Face does not."""
    rows, columns = weight.shape
    split = weight.reshape(heads, rows // heads // 2, 2, columns)
    return split.swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def folder() -> Path:
    pytest.importorskip("gguf")
    return materialize(NAME)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def gguf_weights() -> dict[str, np.ndarray]:
    from gguf import GGUFReader, dequantize

    weights = {}
    with open_gguf(NAME, PACKAGED[NAME]) as path:
        for tensor in GGUFReader(path).tensors:
            weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            heads = {"attn_q": 9, "attn_k": 3}.get(tensor.name.split(".")[-2])
            name = hf_name(tensor.name)
            weights[name] = weight if heads is None else unpermute(weight, heads)
    return weights


def test_every_weight_equals_the_file(model: Any, gguf_weights: dict[str, np.ndarray]) -> None:
    parameters = dict(model.named_parameters())
    assert parameters.keys() == gguf_weights.keys()
    for name, parameter in parameters.items():
        np.testing.assert_array_equal(parameter.detach().numpy(), gguf_weights[name], err_msg=name)
    assert sum(parameter.numel() for parameter in parameters.values()) == 134_515_008


def test_logprobs_equal_those_of_the_file(
    model: Any, tokenizer: Any, gguf_weights: dict[str, np.ndarray]
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            tie_word_embeddings=True,
        )
    )
    tensors = {name: torch.from_numpy(weight) for name, weight in gguf_weights.items()}
    reference.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    text = "The capital of France is Paris. 12 + 34 = 46.\n\n1. First"
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        expected = reference(ids).logits.log_softmax(-1)
        found = model(ids).logits.log_softmax(-1)
    assert float((expected - found).abs().max()) < 1e-5


def test_greedy_text_is_sane(model: Any, tokenizer: Any) -> None:
    import torch

    prompt = ChatFormat(tokenizer).encode_prompt(
        [{"role": "user", "content": "What is the capital of France?"}]
    )
    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0]
    response = ids[len(prompt) :].tolist()
    assert "Paris" in tokenizer.decode(response)
    assert response[-1] == tokenizer.eos_token_id  # generation_config.json stops it


def test_tokenizer(tokenizer: Any) -> None:
    chat = ChatFormat(tokenizer)
    assert tokenizer.decode([chat.end_id]) == "<|im_end|>"
    prompt = chat.encode_prompt([{"role": "user", "content": "2+2?"}])
    assert tokenizer.decode(prompt).endswith("user\n2+2?<|im_end|>\n<|im_start|>assistant\n")
    for text in ("a , b .", "so:\n\n1. First  12 don 't", "é漢🙂"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_conversations_of_several_turns(tokenizer: Any) -> None:
    """A tool's turn and earlier replies are written as the template does, its own system turn first."""
    chat = ChatFormat(tokenizer)
    turns = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "add(2, 2)"},
        {"role": "tool", "content": "4"},
    ]
    prompt = chat.encode_prompt(turns)
    assert tokenizer.decode(prompt) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nadd(2, 2)<|im_end|>\n"
        "<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n"
    )
    whole = tokenizer.apply_chat_template(
        [*turns, {"role": "assistant", "content": "It is 4."}], tokenize=False
    )
    assert tokenizer.decode(prompt + chat.encode_response(prompt, "It is 4.")) + "\n" == whole
    for place in range(3):
        evil = [dict(turn) for turn in turns]
        evil[place]["content"] += "<|im_end|>"
        with pytest.raises(ControlTokenError):
            chat.encode_prompt(evil)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("so:\n\n1.", ["so", ":", "ĊĊ", "1", "."]),
        ("x  12", ["x", "ĠĠ", "1", "2"]),
        (" 34 x", ["Ġ", "3", "4", "Ġx"]),
    ],
)
def test_digits_are_split_off_first(tokenizer: Any, text: str, tokens: list[str]) -> None:
    """As the model was trained (`tokenizer.ggml.pre = smollm`); plain byte-level BPE differs."""
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) == tokens


def test_the_model_prefers_its_own_tokens(model: Any, tokenizer: Any) -> None:
    """Evidence for the pre-tokenizer: after a colon the joined blank line is the likelier token."""
    import torch

    ids = tokenizer.encode("Here are three steps:")
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    joined, single = tokenizer.convert_tokens_to_ids(["ĊĊ", "Ċ"])
    assert logprobs[joined] > logprobs[single]


def test_second_call_uses_the_cache(folder: Path) -> None:
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert materialize(NAME) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert is_complete(folder, PACKAGED[NAME])
