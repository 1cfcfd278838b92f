"""How many pictures at a time are fastest here."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from colabtools.vit.backends.base import Ask
    from colabtools.vit.model import Model

__all__ = ["find_batch_size"]

_LARGEST = 1024
# A batch twice as large is taken where it makes the rate this much better.
_LEAST_GAIN = 1.05
# And no batch takes longer than this: progress would be silent, and a kill cost more.
_LONGEST_S = 2.0
_ROUNDS = 3
# A machine that is busy with something else for a moment must not end the search.
_PATIENCE = 8


def find_batch_size(model: Model, ask: Ask) -> int:
    """Return the smallest power of two at which doubling the batch no longer pays.

    Random pixels are timed, larger batch by larger batch, until memory or patience ends.
    """
    spec = model.preprocessing
    generator = np.random.default_rng(0)
    shape = (spec.height, spec.width, spec.channels)
    size, best, rate = 1, 1, 0.0
    while size <= _LARGEST:
        pixels = generator.integers(0, 256, (size, *shape), dtype=np.uint8)
        try:
            model.backend.start(pixels, ask)()  # what is allocated or compiled once is not timed
            seconds = min(_seconds(model, pixels, ask) for _ in range(_ROUNDS))
        except MemoryError:
            break
        if size / seconds >= _LEAST_GAIN * rate:
            best, rate = size, size / seconds
        elif size >= _PATIENCE * best:
            break
        if 2 * seconds > _LONGEST_S:
            break
        size *= 2
    return best


def _seconds(model: Model, pixels: NDArray[np.uint8], ask: Ask) -> float:
    started = time.perf_counter()
    model.backend.start(pixels, ask)()
    return time.perf_counter() - started
