"""What `plait teach` and `plait probe` share: a model behind rollout workers, and files of rows that survive a kill.

Prompts are worked through in batches. What a batch brought is on disk before the next one starts, each prompt in
exactly one file of the folder, so the same command, given again, goes on behind the last one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..engine.durable import write_durably
from ..engine.errors import DataError
from ..engine.types import Prompt, Rollout, RolloutRequest
from .model import resolve_model
from .placement import reserve
from .run import start_pool
from .sampled_settings import Row, read_settings, refuse_other_settings

if TYPE_CHECKING:
    from ..rollouts.data import Data
    from .config import Recipe

PROMPTS_PER_BATCH = 32


class Sampler(Protocol):
    def wait_started(self, stop_token_ids: Sequence[int] = ()) -> None: ...

    def generate(self, requests: Sequence[RolloutRequest], *, step: int) -> Iterator[Rollout]: ...


@contextmanager
def open_model(recipe: Recipe, model: str) -> Iterator[tuple[Sampler, str]]:
    """A model behind the recipe's rollout workers, and its folder."""
    from .cluster import ray_cluster

    path = resolve_model(model)
    with ExitStack() as stack:
        stack.enter_context(ray_cluster())
        seats = stack.enter_context(reserve(recipe, learner=False))
        yield start_pool(recipe, path, seats, stack), path


class RowFiles:
    """JSONL files of one folder, a row a prompt, and the settings they were made with."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        settings_name: str,
        settings: Row,
        count: Callable[[Row], None] = lambda row: None,
    ) -> None:
        """`count` sees every row, those of an earlier call too.

        Raises ConfigError where the folder holds rows of other settings, DataError where a prompt is there twice.
        """
        self.folder, self.done, self._count = folder, set[str](), count
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / settings_name
        if known.exists():
            refuse_other_settings("--output", folder, read_settings("--output", known), settings)
        else:
            draft = known.with_suffix(".draft")
            write_durably(draft, json.dumps(settings, indent=2) + "\n")
            draft.replace(known)
        for name in names:
            for row in read_whole_lines(folder / name):
                self._note(row)

    def left(self, data: Data, most: int | None) -> tuple[int, list[Prompt]]:
        """How many training prompts are wanted, and those of them that are not there yet."""
        count = min(most or data.num_prompts, data.num_prompts)
        return count, [p for p in data.peek(count) if p.prompt_id not in self.done]

    def append(self, rows: Mapping[str, Sequence[Row]]) -> None:
        """Rows by file name; they are on disk when this returns."""
        for name, mine in rows.items():
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in mine)
                file.flush()
                os.fsync(file.fileno())
        for mine in rows.values():
            for row in mine:
                self._note(row)

    def _note(self, row: Row) -> None:
        if row["id"] in self.done:
            raise DataError(f"{self.folder}: prompt {row['id']!r} is there twice; remove one line")
        self.done.add(row["id"])
        self._count(row)


def batches(prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
    for start in range(0, len(prompts), PROMPTS_PER_BATCH):
        yield prompts[start : start + PROMPTS_PER_BATCH]


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    """The file's rows; a last line that a crash has torn is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("rb+") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.decode().splitlines()]
