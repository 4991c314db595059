"""Words to spell backwards, from reasoning-gym's spell_backward, one letter a line.

    python make_data.py        writes short.jsonl (3 and 4 letters) and long.jsonl (5 and 6 letters)

reasoning-gym's own scorer gives credit for every letter in its place; here an answer is right or wrong (reward
`exact`), so a model that cannot spell backwards yet earns nothing. A letter a line makes each letter a piece of the
solution, which is what hints are cut from. The prompt is the word alone: the model knows no other task.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from reasoning_gym import create_dataset

LETTERS = {"short": (3, 4), "long": (5, 6)}
SIZE = 8000


def rows(fewest: int, most: int) -> Iterator[dict[str, str]]:
    """Each word once, in lower case."""
    words = create_dataset(
        "spell_backward", size=SIZE, seed=0, min_word_len=fewest, max_word_len=most
    )
    seen = set()
    for item in words:
        answer = item["answer"].lower()
        if answer not in seen and answer.isalpha():
            seen.add(answer)
            lines = "".join(f"{letter}\n" for letter in answer)
            yield {"prompt": answer[::-1], "answer": lines, "demonstration": lines}


def main() -> None:
    for name, (fewest, most) in LETTERS.items():
        lines = [json.dumps(row) + "\n" for row in rows(fewest, most)]
        Path(f"{name}.jsonl").write_text("".join(lines))
        print(f"{name}.jsonl: {len(lines)} words")


if __name__ == "__main__":
    main()
