"""The learning rate of each update, as a part of its peak."""

from __future__ import annotations

import math

__all__ = ["lr_factor"]


def lr_factor(name: str, update: int, *, steps: int, warmup_steps: int = 0) -> float:
    """Return the rate of an update, counted from 0, as a part of the peak, in [0, 1].

    It depends on the number alone, so that nothing of it needs to be saved.

    Source: diffusers 0.42, optimization.py: constant, linear to 0, and half a cosine, each after a
    linear rise from 0.

    Args:
        name: "linear", "cosine" or "constant".
        update: in [0, steps).
        steps: all updates, those of the rise included.
        warmup_steps: updates of the rise.

    Raises:
        ValueError: no schedule has that name.
    """
    if update < warmup_steps:
        return update / warmup_steps
    progress = (update - warmup_steps) / max(1, steps - warmup_steps)
    if name == "constant":
        return 1.0
    if name == "linear":
        return max(0.0, 1.0 - progress)
    if name == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    raise ValueError(f"no schedule {name!r}; use linear, cosine or constant")
