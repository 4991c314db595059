"""A hint in the user's turn: rendered by the chat template, under the prompt's own id, within the limit."""

from pathlib import Path
from typing import Any

import pytest

from plait.engine.errors import ConfigError
from plait.rollouts.config import JsonlData
from plait.rollouts.data import load_data
from plait.rollouts.readers import read_records


def load(folder: Path, tokenizer: Any, *, limit: int = 96, **config: Any) -> Any:
    path = folder / "rows.jsonl"
    path.write_text(
        '{"prompt": "2+2?", "answer": "4", "demonstration": "It is {prompt} 4", "id": "x"}\n'
    )
    data = JsonlData(type="jsonl", path=str(path), system_prompt="Add.", **config)
    return load_data(data, tokenizer, num_eval=0, max_prompt_length=limit, max_response_length=32)


def test_the_hint_stands_in_the_users_turn(tmp_path: Path, tokenizer: Any) -> None:
    data = load(tmp_path, tokenizer, hint_template="{prompt} Begin: {hint}...")
    (prompt,) = data.take(1)
    hint = prompt.demonstrations[0].token_ids[:-1]
    shown = data.show_hint(prompt, hint)
    assert shown.messages[-1] == {"role": "user", "content": "2+2? Begin: It is {prompt} 4..."}
    assert shown.messages[0] == prompt.messages[0]
    text = tokenizer.decode(shown.token_ids)
    assert text.endswith("It is {prompt} 4...<|im_end|>\n<|im_start|>assistant\n")
    assert (shown.prompt_id, shown.answer, shown.demonstrations) == (
        "x",
        "4",
        prompt.demonstrations,
    )
    assert data.take(1)[0].token_ids == prompt.token_ids, "the prompt itself is as it was"


def test_a_hint_that_does_not_fit_is_not_shown(tmp_path: Path, tokenizer: Any) -> None:
    whole = load(tmp_path, tokenizer)
    (prompt,) = whole.take(1)
    hint = prompt.demonstrations[0].token_ids[:-1]
    length = len(whole.show_hint(prompt, hint).token_ids)
    assert load(tmp_path, tokenizer, limit=length).show_hint(prompt, hint) is not None
    assert load(tmp_path, tokenizer, limit=length - 1).show_hint(prompt, hint) is None


def test_a_template_without_a_place_for_the_hint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "2+2?"}\n')
    config = JsonlData(type="jsonl", path=str(path), hint_template="{prompt}")
    with pytest.raises(ConfigError, match=r"data.hint_template.*\{prompt\} and \{hint\}"):
        read_records(config)
