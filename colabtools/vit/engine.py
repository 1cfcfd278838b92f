"""Any number of pictures through a model: bounded memory, nothing done twice, nothing lost.

The unit of work is a shard of the list of pictures. Its part is named by a digest of all that its
content depends on: the pictures' names and stamps, the model, the preprocessing and what is asked
for. So a part that is there is right, whoever made it and when; going on after a kill, trying
again and sharing the work out are all the same call.

Threads decode while the model computes. On a GPU the next batch is on its way before the result of
the last one is fetched.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from colabtools.errors import ImageError, ModelError
from colabtools.report import get_logger

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from colabtools.vit.backends.base import Ask
    from colabtools.vit.model import Model
    from colabtools.vit.sources import Source

__all__ = ["Results", "Runner", "Shard", "plan_shards"]

# Batches decoded ahead of the one that is computed.
_AHEAD = 2


@dataclass(frozen=True)
class Shard:
    """Pictures whose results are kept together.

    Attributes:
        number: of the shard.
        start: number of its first picture.
        stop: number after its last.
        name: of its part, without suffix.
    """

    number: int
    start: int
    stop: int
    name: str

    def __len__(self) -> int:
        """Return the number of pictures."""
        return self.stop - self.start


@dataclass
class Results:
    """What came of a shard.

    Attributes:
        shard: which.
        errors: by number of the picture, why there is no result.
        numbers: of the pictures that have one, ascending.
        chunks: their results, (n, K) or (n, D) in all.
    """

    shard: Shard
    errors: dict[int, str] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    chunks: list[NDArray[np.float32]] = field(default_factory=list)

    def rows(self, width: int) -> NDArray[np.float32]:
        """Return the results (n, width), in the order of `numbers`."""
        return np.concatenate([np.empty((0, width), np.float32), *self.chunks])


def plan_shards(source: Source, shard_size: int, settings: dict[str, Any]) -> list[Shard]:
    """Return the shards of a source, each named by all that its results depend on.

    Args:
        source: the pictures.
        shard_size: pictures in a shard.
        settings: of the run, as JSON values.
    """
    base = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    shards = []
    for number, start in enumerate(range(0, len(source.names), shard_size)):
        stop = min(start + shard_size, len(source.names))
        digest = base.copy()
        for name, stamp in zip(source.names[start:stop], source.stamps[start:stop], strict=True):
            digest.update(f"{name}\0{stamp}\0".encode("utf-8", "surrogateescape"))
        if source.columns is not None:
            own = source.columns.slice(start, stop - start)
            digest.update(repr((own.column_names, own.to_pylist())).encode("utf-8", "replace"))
        shards.append(Shard(number, start, stop, f"part-{number:05}-{digest.hexdigest()[:16]}"))
    return shards


@dataclass
class Runner:
    """A model, and the threads that decode for it.

    Attributes:
        model: what computes.
        ask: what it is asked for.
        batch_size: pictures at a time; 0 for what is found to be fast. It halves when memory runs
            out.
        workers: threads that decode; 0 for one per processor.
    """

    model: Model
    ask: Ask
    batch_size: int = 0
    workers: int = 0

    def run(
        self, source: Source, shards: Sequence[Shard], done: Callable[[int], object]
    ) -> Iterator[Results]:
        """Yield the results of each shard, in order.

        Args:
            source: the pictures.
            shards: which of them.
            done: called with the number of pictures that are through, again and again.

        Raises:
            ModelError: not even one picture at a time fits in memory.
        """
        if not shards:
            return
        self.batch_size = self.batch_size or self._find_batch_size()
        computed: deque[tuple[_Decoded, Callable[[], NDArray[np.float32]]]] = deque()
        results: dict[int, Results] = {shard.number: Results(shard) for shard in shards}
        left = {shard.number: len(shard) for shard in shards}
        with ThreadPoolExecutor(self.workers or os.cpu_count() or 1) as pool:
            decoded = self._decode(source, shards, pool)
            while True:
                batch = next(decoded, None)
                if batch is not None:
                    computed.append((batch, self._start(batch.pixels)))
                while computed and (batch is None or len(computed) > 1):
                    ready, wait = computed.popleft()
                    self._keep(results[ready.shard.number], ready, wait())
                    ready.release()
                    done(len(ready.numbers) + len(ready.errors))
                    left[ready.shard.number] -= len(ready.numbers) + len(ready.errors)
                    if not left[ready.shard.number]:
                        yield results.pop(ready.shard.number)
                if batch is None:
                    return

    def _keep(self, results: Results, batch: _Decoded, rows: NDArray[np.float32]) -> None:
        results.errors |= batch.errors
        finite = np.asarray(np.isfinite(rows).all(axis=1))
        for number in (n for n, ok in zip(batch.numbers, finite, strict=True) if not ok):
            results.errors[number] = f"the model gives no finite numbers in {self._dtype}"
        results.numbers += [n for n, ok in zip(batch.numbers, finite, strict=True) if ok]
        results.chunks.append(rows[finite])

    @property
    def _dtype(self) -> str:
        return self.model.backend.dtype

    def _start(self, pixels: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        """Begin with a batch, in pieces where it is too large for memory."""
        if not len(pixels):
            width = self.model.width(self.ask)
            return lambda: np.empty((0, width), np.float32)
        size = min(self.batch_size, len(pixels))
        while True:
            pieces = [pixels[start : start + size] for start in range(0, len(pixels), size)]
            try:
                if len(pieces) == 1:
                    return self.model.backend.start(pieces[0], self.ask)
                found = np.concatenate([self.model.backend.start(p, self.ask)() for p in pieces])
                return lambda: found
            except MemoryError as error:
                if size == 1:
                    raise ModelError(
                        f"{self.model.files.name} does not fit in the memory of "
                        f"{self.model.backend.device} with one picture; give another device or "
                        "dtype"
                    ) from error
                size //= 2
                self.batch_size = size
                get_logger(__name__).warning("out of memory: %s pictures at a time now", size)

    def _find_batch_size(self) -> int:
        from colabtools.vit.batching import find_batch_size

        found = find_batch_size(self.model, self.ask)
        get_logger(__name__).info("%s pictures at a time", found)
        return found

    def _decode(
        self, source: Source, shards: Sequence[Shard], pool: ThreadPoolExecutor
    ) -> Iterator[_Decoded]:
        """Yield batches in order, the next ones being decoded meanwhile."""
        buffers = _Buffers(self.model)
        waiting: deque[tuple[_Decoded, list[Future[str]]]] = deque()
        try:
            for shard, numbers in self._slices(shards):
                batch = _Decoded(shard, list(numbers), buffers)
                waiting.append((batch, batch.submit(source, self.model, pool)))
                if len(waiting) > _AHEAD:
                    yield _finish(*waiting.popleft())
            while waiting:
                yield _finish(*waiting.popleft())
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()

    def _slices(self, shards: Iterable[Shard]) -> Iterator[tuple[Shard, range]]:
        """Yield the numbers of each batch; none reaches over a shard's end."""
        for shard in shards:
            start = shard.start
            while start < shard.stop:
                stop = min(start + self.batch_size, shard.stop)
                yield shard, range(start, stop)
                start = stop


class _Buffers:
    """Room for batches, used again and again: fresh memory costs more than to fill it."""

    def __init__(self, model: Model) -> None:
        spec = model.preprocessing
        self._shape = (spec.height, spec.width, spec.channels)
        self._pinned = model.backend.name == "torch" and model.backend.device == "cuda"
        self._free: list[NDArray[np.uint8]] = []

    def take(self, count: int) -> NDArray[np.uint8]:
        """Return room for at least `count` pictures."""
        for place, buffer in enumerate(self._free):
            if len(buffer) >= count:
                return self._free.pop(place)
        if self._pinned:
            import torch

            made = torch.empty((count, *self._shape), dtype=torch.uint8, pin_memory=True)
            room: NDArray[np.uint8] = made.numpy()
            return room
        return np.empty((count, *self._shape), np.uint8)

    def give_back(self, buffer: NDArray[np.uint8]) -> None:
        self._free.append(buffer)


@dataclass
class _Decoded:
    """A batch of a shard: the pixels of those pictures that could be read."""

    shard: Shard
    numbers: list[int]
    buffers: _Buffers
    errors: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._buffer = self.buffers.take(len(self.numbers))
        self.pixels = self._buffer[: len(self.numbers)]

    def submit(self, source: Source, model: Model, pool: ThreadPoolExecutor) -> list[Future[str]]:
        spec, pixels = model.preprocessing, self.pixels

        def read(row: int, number: int) -> str:
            """Fill a row, and return why it could not be filled."""
            try:
                pixels[row] = spec.read(source.read(number))
            except ImageError as error:
                return " ".join(str(error).split())
            except MemoryError:
                return f"{source.names[number]} is too large for this machine's memory"
            return ""

        return [pool.submit(read, *each) for each in enumerate(self.numbers)]

    def drop(self, faults: Sequence[str]) -> None:
        """Keep only the pictures without a fault."""
        if not any(faults):
            return
        self.errors = {n: fault for n, fault in zip(self.numbers, faults, strict=True) if fault}
        kept = [row for row, fault in enumerate(faults) if not fault]
        # In the room that is there: each row moves forward at most.
        for place, row in enumerate(kept):
            if place != row:
                self.pixels[place] = self.pixels[row]
        self.numbers = [self.numbers[row] for row in kept]
        self.pixels = self.pixels[: len(kept)]

    def release(self) -> None:
        self.buffers.give_back(self._buffer)


def _finish(batch: _Decoded, futures: Sequence[Future[str]]) -> _Decoded:
    batch.drop([future.result() for future in futures])
    return batch
