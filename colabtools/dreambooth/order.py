"""Which pictures each update learns from, by its number alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from colabtools.dreambooth.buckets import epoch_batches
from colabtools.dreambooth.randomness import derive_seed, generator_for

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Order", "Slot"]


@dataclass(frozen=True)
class Slot:
    """A place in an update: which picture stands there, of the photos or of the class.

    `number` counts the places of one kind within the update; with stage and update it seeds the
    example's draws.
    """

    kind: str
    row: int
    number: int


class Order:
    """The order of a set of pictures over all updates; each comes once in every epoch.

    Pictures of one shape form batches that are always full, across the end of an epoch where
    need be. Where shapes differ, a batch holds one of them, and the last of a shape may be smaller.
    """

    def __init__(
        self,
        kind: str,
        shapes: Sequence[tuple[int, ...]],
        *,
        batch_size: int,
        batches_per_update: int,
        seed: int,
    ) -> None:
        self._kind = kind
        self._shapes = tuple((shape[-1], shape[-2]) for shape in shapes)
        self._batch_size = batch_size
        self._batches_per_update = batches_per_update
        self._seed = seed
        self._one_shape = len(set(self._shapes)) <= 1
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)

    def batches(self, update: int) -> list[list[Slot]]:
        """Return the batches of an update, counted from 0; none if there are no pictures."""
        if not self._shapes:
            return []
        first = update * self._batches_per_update
        rows = [self._batch(first + i) for i in range(self._batches_per_update)]
        slots, number = [], 0
        for batch in rows:
            slots.append([Slot(self._kind, row, number + i) for i, row in enumerate(batch)])
            number += len(batch)
        return slots

    def epoch_of(self, update: int) -> float:
        """Return how many times the pictures were seen before this update."""
        if not self._one_shape:
            return update * self._batches_per_update / len(self._epoch(0))
        return update * self._batches_per_update * self._batch_size / max(1, len(self._shapes))

    def _batch(self, index: int) -> list[int]:
        if not self._one_shape:
            epoch, place = divmod(index, len(self._epoch(0)))
            return self._epoch(epoch)[place]
        count = len(self._shapes)
        places = range(index * self._batch_size, (index + 1) * self._batch_size)
        return [self._epoch(place // count)[0][place % count] for place in places]

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        generator = generator_for(self._seed, "order", self._kind, epoch)
        if self._one_shape:
            permutation: list[int] = torch.randperm(len(self._shapes), generator=generator).tolist()
            return [permutation]
        return epoch_batches(self._shapes, self._batch_size, generator)

    def seed_of(self, stage: int, update: int, slot: Slot) -> int:
        """Return the seed of an example's own draws."""
        return derive_seed(self._seed, stage, update, slot.kind, slot.number)
