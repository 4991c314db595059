"""The recipe's `data.sampling` and `data.parts` -> the streams that prompts are drawn from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..engine.errors import ConfigError
from .attempts import Attempts
from .config import CurriculumSampling, DataConfig, DifficultySampling
from .draws import CurriculumStream, WeightedStream
from .order import ShuffledStream
from .records import Records
from .streams import PartStream
from .usable import Usable, parts_of


def make_attempts(config: DataConfig, n: int) -> Attempts | None:
    """None where nothing asks what the run observed."""
    if config.observing is None:
        return None
    sampling = config.sampling
    memory = sampling.memory if isinstance(sampling, DifficultySampling) else 0.0
    return Attempts(n, memory, config.filter)


def part_streams(
    config: DataConfig, records: Records, kept: Usable, total: int, attempts: Attempts | None
) -> list[PartStream]:
    """The training streams; `total`: prompts that the run draws."""
    found = parts_of(records, kept)
    weight = sum(part.weight for part, _ in found)
    streams = []
    for part, rows in found:
        key = {"seed": config.seed, "name": f"prompts/{part.name}" if part.name else "prompts"}
        sampling = config.sampling
        if isinstance(sampling, CurriculumSampling):
            difficulty = kept.difficulty[rows]
            _require_difficulty(records, kept, rows)
            share = max(1, round(total * part.weight / weight))
            stream = CurriculumStream(sampling, difficulty, share, **key)
        elif isinstance(sampling, DifficultySampling) and attempts is not None:
            stream = WeightedStream(sampling, _rates_of(attempts, rows), **key)
        else:
            stream = ShuffledStream(len(rows), **key)
        streams.append(PartStream(part.name, part.weight, rows, stream))
    return streams


def _rates_of(attempts: Attempts, rows: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: attempts.rates[rows]


def _require_difficulty(records: Records, kept: Usable, rows: np.ndarray) -> None:
    lacking = rows[np.isnan(kept.difficulty[rows])]
    if len(lacking):
        names = [records.train[int(kept.index[row])].prompt_id for row in lacking[:3]]
        raise ConfigError.at(
            "data.sampling.type",
            "curriculum",
            f"orders by the column data.columns.difficulty, which {len(lacking)} of {len(rows)} training rows lack or "
            f"hold as no number, for example {', '.join(map(repr, names))}; fill it, or choose shuffled or difficulty",
        )


def expert_streams(config: DataConfig, records: Records, kept: Usable) -> list[PartStream]:
    """Always shuffled; of parts without a demonstration nothing is drawn."""
    streams = []
    for part, rows in parts_of(records, kept):
        shown = rows[kept.demonstrated[rows]]
        if len(shown) or not part.name:
            name = f"experts/{part.name}" if part.name else "experts"
            stream = ShuffledStream(len(shown), seed=config.seed, name=name)
            streams.append(PartStream(part.name, part.weight, shown, stream))
    return streams
