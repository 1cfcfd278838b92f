"""Pictures of several shapes: which shapes there are, and batches that hold only one of them."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["bucket_shapes", "bucket_step", "epoch_batches", "nearest_bucket"]

# Neither side is more than this many times the other: base models saw few longer pictures.
_LONGEST_RATIO = 2
# Pixels that one latent of a network's innermost level stands for: 8 of the VAE times 2 ** 3.
_STEP = 64
_LEAST_STEP = 8
# From here on a step is fine enough to meet common photos' shapes.
_SMALL = 256


def bucket_step(resolution: int) -> int:
    """Return the pixels by which shapes grow: 64, and for small models an eighth of the side."""
    if resolution >= _SMALL:
        return _STEP
    return max(_LEAST_STEP, resolution // 8 // _LEAST_STEP * _LEAST_STEP)


def bucket_shapes(resolution: int, step: int) -> tuple[tuple[int, int], ...]:
    """Return all (width, height) in multiples of `step`, from the tallest to the widest.

    Each has at most the area of the square of side `resolution`, is not beyond 1:2 or 2:1, and
    cannot grow in either direction without breaking one of these. A resolution that is no multiple
    of the step still has its own square.
    """
    most = resolution**2
    sides = range(step, _LONGEST_RATIO * resolution + 1, step)
    allowed = {
        (width, height)
        for width in sides
        for height in sides[: most // width // step]
        if max(width, height) <= _LONGEST_RATIO * min(width, height)
    }
    largest = {
        (width, height)
        for width, height in allowed
        if (width + step, height) not in allowed and (width, height + step) not in allowed
    }
    return tuple(sorted(largest | {(resolution, resolution)}))


def nearest_bucket(width: int, height: int, shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the shape to which a photo can be cut with the least loss.

    Of two that keep the same share of it, the one of larger area, then the wider.
    """

    def worth(shape: tuple[int, int]) -> tuple[Fraction, int, int]:
        # The share that is kept is the smaller aspect ratio over the larger, here without rounding.
        ratios = (width * shape[1], height * shape[0])
        return Fraction(min(ratios), max(ratios)), shape[0] * shape[1], shape[0]

    return max(shapes, key=worth)


def epoch_batches(
    shapes: Sequence[tuple[int, int]], batch_size: int, generator: torch.Generator
) -> list[list[int]]:
    """Return the rows of an epoch in random batches: each row once, in every batch one shape.

    The last batch of a shape may be smaller. Their number is the same in every epoch.

    Args:
        shapes: shape of each row.
        batch_size: rows of a full batch.
        generator: decides the order; a CPU generator.
    """
    import torch

    rows_of: dict[tuple[int, int], list[int]] = {}
    for row, shape in enumerate(shapes):
        rows_of.setdefault(shape, []).append(row)
    batches = []
    for rows in rows_of.values():
        order = torch.randperm(len(rows), generator=generator).tolist()
        shuffled = [rows[place] for place in order]
        batches += [shuffled[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
