"""Random draws that need no state: a function of what they are for, so a resumed run repeats them."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def uniforms(num: int, *key: int | str) -> list[float]:
    """`num` numbers in [0, 1) that depend on every part of the key, such as (seed, step, prompt_id).

    >>> uniforms(2, 0, 5, "sums/1") == uniforms(2, 0, 5, "sums/1")
    True
    """
    entropy = int.from_bytes(blake2b(repr(key).encode(), digest_size=16).digest())
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
    return generator.random(num).tolist()
