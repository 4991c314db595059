"""The shape of a model: from its config, or for a few well-known hub ids from here, where no hub answers."""

from __future__ import annotations

from typing import Any

from ..engine.errors import HubError

QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
KNOWN: dict[str, dict[str, Any]] = {
    "Elliott/Qwen2.5-Math-7B-16k-think": QWEN_7B,
    "Qwen/Qwen2.5-7B": QWEN_7B,
    "Qwen/Qwen2.5-7B-Instruct": QWEN_7B,
    "Qwen/Qwen2.5-Math-7B": QWEN_7B,
    "Qwen/Qwen2.5-3B": {
        "model_type": "qwen2",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}


def load_architecture(model_path: str) -> Any:
    """The transformers config of a folder or of a hub id that the hub or its cache has."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_path)


def known_architecture(name: str) -> Any:
    """The same from this file. Raises HubError at model.path for a model that is not in it."""
    from transformers import AutoConfig

    if name not in KNOWN:
        message = f"the hub does not answer, and only {', '.join(KNOWN)} can be planned without it"
        raise HubError.at("model.path", name, message)
    return AutoConfig.for_model(**KNOWN[name])
