"""Coefficients as functions of `step`, the number of completed loop steps. Stateless, so they resume by themselves."""

from math import cos, pi


def cosine(step: int, start: float, end: float, num_steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at `num_steps`, `end` ever after."""
    if step >= num_steps:
        return end
    return end + (start - end) / 2 * (1 + cos(pi * step / num_steps))


def warmup_cosine(
    step: int, peak: float, valley: float, warmup_steps: int, decay_steps: int
) -> float:
    """Linear from 0 to `peak`, then half a cosine down to `valley` (mu of CHORD, arXiv 2508.11408)."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return cosine(step - warmup_steps, peak, valley, decay_steps)
