"""Orders that depend on more than a shuffle: by success rate, and from easy to hard.

Like `order.ShuffledStream` each is a function of its position, here with what the run has observed so far
(`attempts.Attempts`) or with a column of the data. The rows of one take are distinct.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .config import CurriculumSampling, DifficultySampling
from .order import Permutation, derive_key


class WeightedStream:
    """Draws without replacement, by weights that follow the success rates.

    weight(rate) = max(min_weight, 1 - |rate - target| / max(target, 1 - target)), and 1 for a prompt never seen: its
    rate may be the target. One take sorts u^(1/weight), u uniform (Efraimidis & Spirakis 2006, "Weighted random
    sampling with a reservoir"), with random numbers keyed by seed and position.
    """

    def __init__(
        self, config: DifficultySampling, rates: Callable[[], np.ndarray], *, seed: int, name: str
    ) -> None:
        """`rates`: success rates of the stream's rows [n], NaN where a prompt was never seen."""
        self.n = len(rates())
        self.position = 0
        self._config = config
        self._rates = rates
        self._key = (seed, name)

    @property
    def epoch(self) -> int:
        return self.position // self.n

    def weights(self) -> np.ndarray:
        target = self._config.target_rate
        distance = np.abs(self._rates() - target) / max(target, 1 - target)
        return np.maximum(np.where(np.isnan(distance), 1.0, 1 - distance), self._config.min_weight)

    def take(self, count: int, allowed: np.ndarray | None = None) -> list[int]:
        key = int.from_bytes(derive_key(*self._key, self.position), "little")
        uniform = np.random.Generator(np.random.Philox(key=key)).random(self.n)
        keys = np.log1p(-uniform) / self.weights()  # log of u^(1/weight), u in (0, 1]
        if allowed is not None:
            keys = np.where(allowed, keys, -np.inf)
        self.position += count
        return np.argsort(-keys, kind="stable")[:count].tolist()


class CurriculumStream:
    """Uniform draws from the easiest rows, of which more are open the further the run is.

    After a share t of the run's prompts, start + (1 - start) t of the rows are open, sorted by difficulty; with a
    window only the last ones of them (pacing functions: Hacohen & Weinshall 2019, "On the power of curriculum
    learning"). Where fewer rows are open than a take needs, it draws from the easiest that suffice.
    """

    def __init__(
        self,
        config: CurriculumSampling,
        difficulty: np.ndarray,
        total: int,
        *,
        seed: int,
        name: str,
    ) -> None:
        """`difficulty`: of each row [n]; `total`: prompts that the whole run draws from this stream."""
        self.n = len(difficulty)
        self.position = 0
        self._config = config
        self._order = np.argsort(difficulty, kind="stable")
        self._total = total
        self._key = (seed, name)

    @property
    def epoch(self) -> int:
        return self.position // self.n

    def take(self, count: int, allowed: np.ndarray | None = None) -> list[int]:
        order = self._order if allowed is None else self._order[allowed[self._order]]
        progress = min(1.0, self.position / self._total)
        start, window = self._config.start, self._config.window
        end = start + (1 - start) * progress
        high = max(count, round(end * len(order)))
        low = 0 if window is None else min(round((end - window) * len(order)), high - count)
        low = max(0, low)
        shuffle = Permutation(high - low, derive_key(*self._key, self.position))
        self.position += count
        return [int(order[low + shuffle(i)]) for i in range(count)]
