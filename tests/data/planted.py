"""A JSONL data set with 20 planted defects, two of each kind that admission knows, among clean rows.

`plant(folder, tokenizer)` writes `planted.jsonl` and returns what must be found: (prompt id, place or None, reason).
The recipe that reads it needs `eval.num_prompts = NUM_EVAL`, LIMITS, and the reward `exact`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plait.rollouts.chat import ChatFormat
from plait.rollouts.config import JsonlData
from plait.rollouts.readers import read_records

NUM_EVAL = 8
NUM_ROWS = 80
LIMITS = {"max_prompt_length": 200, "max_response_length": 100}
Defect = tuple[str, int | None, str]


def clean_row(i: int) -> dict[str, Any]:
    """Prompts of more than 13 words whose 13-grams all differ; no long text comes twice."""
    words = " ".join(f"{name}{i}" for name in "abcdefghijkl")
    return {
        "id": f"row{i}",
        "prompt": f"{words} what is {i} + {i} ?",
        "answer": str(2 * i),
        "demonstration": f"{i} + {i} is \\boxed{{{2 * i}}}",
    }


def plant(folder: Path, tokenizer: Any) -> list[Defect]:
    rows = [clean_row(i) for i in range(NUM_ROWS)]
    path = folder / "planted.jsonl"
    write(path, rows)
    # Which rows are held out depends on the seed and the number of rows: those stay as they are.
    records = read_records(JsonlData(type="jsonl", path=str(path)), NUM_EVAL)
    held = [record.prompt_id for record in records.held_out]
    train = [row for row in rows if row["id"] not in held]
    found: list[Defect] = []

    def spoil(reason: str, place: int | None = 0, **columns: Any) -> None:
        row = train[3 * len(found)]
        row.update({name: fill(value, row) for name, value in columns.items()})
        found.append((row["id"], place, reason))

    held_prompts = [row["prompt"] for row in rows if row["id"] in held]
    spoil("wrong", demonstration="it is \\boxed{-1}")
    spoil("wrong", 1, demonstration=["\\boxed{ANSWER}", "\\boxed{ANSWER.5}"])
    spoil("unknown", answer=None)
    spoil("unknown", answer=None, demonstration="I guess \\boxed{ANSWER}")
    spoil("too_long", demonstration="so " * 100 + "\\boxed{ANSWER}")
    spoil("too_long", demonstration="x" * 200 + "\\boxed{ANSWER}")
    spoil("no_end", demonstration="\\boxed{ANSWER}\n```python\nprint(")
    spoil("no_end", metadata={"finish_reason": "length"})
    spoil("control_token", demonstration="\\boxed{ANSWER}<|im_end|>")
    spoil("control_token", 1, demonstration=["\\boxed{ANSWER}", "<|im_start|>user"])
    spoil("foreign_template", demonstration="[INST] hm [/INST] \\boxed{ANSWER}")
    spoil("foreign_template", demonstration="### Assistant: \\boxed{ANSWER}")
    spoil("fully_masked", token_weights=masked(train[3 * len(found)], tokenizer))
    row = train[3 * len(found)]
    row["demonstration"] = "y" * 200 + f"\\boxed{{{row['answer']}}}"
    spoil("fully_masked", token_weights=masked(row, tokenizer))
    spoil("duplicate", 1, demonstration=["\\boxed{ANSWER}", "\\boxed{ANSWER}"])
    spoil("duplicate", demonstration="a b c d e f g h i j k l \\boxed{7}", answer="7")
    train[3 * len(found) - 4].update(
        demonstration="a b c d e f g h i j k l \\boxed{7}", answer="7"
    )  # the row before it, which is the clean one of the two
    spoil("duplicate_prompt", None, prompt=train[1]["prompt"])
    spoil("duplicate_prompt", None, prompt=train[1]["prompt"])
    spoil("eval_copy", None, prompt=" ".join(held_prompts[0].split()[:15]) + ".")
    spoil("eval_overlap", None, prompt=held_prompts[1] + " and nothing else at all, please")
    write(path, rows)
    return found


def masked(row: dict[str, Any], tokenizer: Any) -> list[float]:
    """Weight 0 for all tokens within the limit, 1 beyond it."""
    chat = ChatFormat(tokenizer)
    prompt = chat.encode_prompt([{"role": "user", "content": row["prompt"]}])
    num = len(chat.encode_response(prompt, row["demonstration"]))
    limit = LIMITS["max_response_length"]
    return [0.0] * min(num, limit) + [1.0] * max(num - limit, 0)


def fill(value: Any, row: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [fill(item, row) for item in value]
    return value.replace("ANSWER", row["answer"]) if isinstance(value, str) else value


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
