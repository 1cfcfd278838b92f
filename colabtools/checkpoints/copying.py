"""Bytes from sources into one output file, and a second pair of eyes that follows behind.

Where the dtype stays, ranges of files are copied by the kernel. `Checker` reads what was written,
and its sources once more, in a thread of its own that runs on another core.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

from colabtools.checkpoints.casting import cast_bytes, identity_bytes, transposed_bytes
from colabtools.checkpoints.headers import TensorEntry, one_line
from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from colabtools.checkpoints.plan import Piece, Target

__all__ = ["Checker", "Copier", "Readers", "target_bytes"]

# A multiple of every dtype's size; two of them fit into the cache of a core.
_CHUNK_BYTES = 512 * 1024
# How much is copied before the checker and the progress hear of it; it stays in the shared cache.
_STEP_BYTES = 8 * 1024**2
# What a file system says that cannot copy within the kernel, or not from that other one.
_NO_KERNEL_COPY = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV}
)


class Readers:
    """The source files, each opened once, for several threads; closed at the end of a `with`."""

    def __init__(self) -> None:
        """Open nothing yet."""
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._memory = threading.local()

    def __enter__(self) -> Readers:
        """Return the readers."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close every file."""
        for descriptor in self._descriptors.values():
            with suppress(OSError):
                os.close(descriptor)

    def descriptor(self, path: Path) -> int:
        """Return the number of the open file.

        Raises:
            CheckpointError: it cannot be opened.
        """
        with self._lock:
            if path not in self._descriptors:
                try:
                    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
                    self._descriptors[path] = os.open(path, flags)
                except OSError as error:
                    raise CheckpointError(
                        f"cannot read {one_line(path)}: {error.strerror}; check the path"
                    ) from error
            return self._descriptors[path]

    @property
    def buffer(self) -> memoryview:
        """The thread's own memory for one chunk: fresh memory for each would cost a third more."""
        if not hasattr(self._memory, "view"):
            self._memory.view = memoryview(bytearray(_CHUNK_BYTES))
        view: memoryview = self._memory.view
        return view

    def read(self, entry: TensorEntry, begin: int, view: memoryview) -> None:
        """Fill the view with bytes of a tensor, from `begin` of its own bytes on.

        Raises:
            CheckpointError: the file cannot be read that far.
        """
        _fill_view(self.descriptor(entry.path), entry.begin + begin, view, entry.path)


def _fill_view(descriptor: int, offset: int, view: memoryview, path: Path) -> None:
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"cannot read {one_line(path)}: {error.strerror}") from error
        if not count:
            raise CheckpointError(
                f"{one_line(path)} ends at byte {offset + done}; it changed while it was read"
            )
        done += count


def target_bytes(target: Target, readers: Readers) -> Iterator[memoryview]:
    """Return what a tensor of the output is to be, in chunks that hold until the next one.

    Raises:
        CheckpointError: a source cannot be read, or a number does not fit into the dtype.
    """
    if target.fill:
        yield identity_bytes(target.shape[0], target.dtype)
    elif target.transpose:
        data = bytearray()
        for chunk in _piece_bytes(target, target.pieces[0], readers):
            data += chunk
        yield from transposed_bytes(memoryview(data), target.dtype, target.shape[::-1])
    else:
        for piece in target.pieces:
            yield from _piece_bytes(target, piece, readers)


def _piece_bytes(target: Target, piece: Piece, readers: Readers) -> Iterator[memoryview]:
    same = piece.source.dtype == target.dtype
    for chunk in _raw_bytes(piece, readers):
        if same:
            yield chunk
        else:
            yield cast_bytes(chunk, piece.source.dtype, target.dtype, piece.source.name)


def _raw_bytes(piece: Piece, readers: Readers) -> Iterator[memoryview]:
    source = piece.source
    if isinstance(source, TensorEntry):
        view = readers.buffer
        for begin in range(piece.begin, piece.end, _CHUNK_BYTES):
            part = view[: min(_CHUNK_BYTES, piece.end - begin)]
            readers.read(source, begin, part)
            yield part
        return
    import torch

    tensor = source.load().detach().cpu().contiguous()
    data: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    for begin in range(piece.begin, piece.end, _CHUNK_BYTES):
        yield data[begin : min(begin + _CHUNK_BYTES, piece.end)]


class Copier:
    """Writes one output file from its first byte to its last."""

    def __init__(
        self,
        descriptor: int,
        readers: Readers,
        checker: Checker | None = None,
        count: Callable[[int], object] = lambda _: None,
    ) -> None:
        """Begin at byte 0.

        Args:
            descriptor: the output, open for reading and writing.
            readers: the sources.
            checker: what compares the output meanwhile.
            count: told how many bytes of tensors were written.
        """
        self._descriptor, self._readers = descriptor, readers
        self._checker, self._count = checker, count
        self._kernel = hasattr(os, "copy_file_range")
        self.position = 0

    def literal(self, data: bytes, at: int | None = None) -> None:
        """Write bytes, in turn or where room was left for them."""
        offset = self.position if at is None else at
        _write_all(self._descriptor, memoryview(data), offset)
        if self._checker is not None:
            self._checker.expect(offset, data)
        self._advance(max(self.position, offset + len(data)))

    def targets(self, targets: Iterable[Target]) -> None:
        """Write tensors one after the other, what lies together in a file in one run.

        Raises:
            CheckpointError: a source cannot be read, a number does not fit into its dtype, or the
                checker found a difference.
            OSError: the storage failed.
        """
        run: tuple[Path, int, int] | None = None
        begin = self.position
        for target in targets:
            if self._checker is not None:
                self._checker.expect(begin, target)
            begin += target.size_bytes
            if target.copied:
                run = self._extend(run, target)
                continue
            self._flush(run)
            run = None
            for chunk in target_bytes(target, self._readers):
                _write_all(self._descriptor, chunk, self.position)
                self._step(len(chunk))
        self._flush(run)

    def after_header(self, target: Target, size_bytes: int, header: Callable[[int], bytes]) -> int:
        """Write a tensor behind a header of this size that needs its CRC-32; return that.

        Raises:
            CheckpointError: as `targets`.
            OSError: the storage failed.
        """
        import zlib

        start, checksum = self.position, 0
        end = start + size_bytes
        if self._checker is not None:
            self._checker.expect(end, target)
        for chunk in target_bytes(target, self._readers):
            checksum = zlib.crc32(chunk, checksum)
            _write_all(self._descriptor, chunk, end)
            end += len(chunk)
            self._count(len(chunk))
        # What comes before it is the last to be written, and no earlier fit to be hashed.
        self.position = end
        self.literal(header(checksum), start)
        return checksum

    def _extend(
        self, run: tuple[Path, int, int] | None, target: Target
    ) -> tuple[Path, int, int] | None:
        """Return the run with a tensor's bytes behind it, or what is left once it was copied."""
        for path, begin, end in _ranges(target):
            if run is not None and run[0] == path and run[2] == begin:
                run = (path, run[1], end)
            else:
                self._flush(run)
                run = (path, begin, end)
            if run[2] - run[1] >= _STEP_BYTES:
                self._flush(run)
                run = None
        return run

    def _flush(self, run: tuple[Path, int, int] | None) -> None:
        if run is None:
            return
        path, begin, end = run
        source = self._readers.descriptor(path)
        while begin < end:
            count = self._copy(source, begin, min(end - begin, _STEP_BYTES))
            if not count:
                raise CheckpointError(
                    f"{one_line(path)} ends at byte {begin}; it changed while it was read"
                )
            begin += count
            self._step(count)

    def _copy(self, source: int, begin: int, count: int) -> int:
        if self._kernel:
            try:
                return os.copy_file_range(source, self._descriptor, count, begin, self.position)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                # Another file system, or one that cannot do it: through memory then, to the end.
                self._kernel = False
        view = self._readers.buffer[:count]
        read = os.preadv(source, [view], begin)
        _write_all(self._descriptor, view[:read], self.position)
        return read

    def _step(self, count: int) -> None:
        self._advance(self.position + count)
        self._count(count)

    def _advance(self, position: int) -> None:
        self.position = position
        if self._checker is not None:
            self._checker.advance(position)


def _ranges(target: Target) -> Iterator[tuple[Path, int, int]]:
    for piece in target.pieces:
        source = piece.source
        if isinstance(source, TensorEntry) and piece.begin < piece.end:
            yield source.path, source.begin + piece.begin, source.begin + piece.end


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while len(view):
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


class Checker:
    """Hashes an output while it is written, and compares it with what it is to be.

    A thread hashes what was written, in order, and compares when it has caught up; `finish` lets
    the calling thread compare what is left while the hashing goes on. What is found is raised in
    the calling thread, at its next step or at the end.
    """

    def __init__(self, descriptor: int, readers: Readers, path: Path) -> None:
        """Start the thread.

        Args:
            descriptor: the output, open for reading.
            readers: the sources, to be read once more.
            path: what messages call the output.
        """
        self._descriptor, self._readers, self._path = descriptor, readers, path
        self._changed = threading.Condition()
        self._tasks: deque[tuple[int, bytes | Target]] = deque()
        self._written, self._hashed = 0, 0
        self._closed = self._stopped = False
        self._failure: BaseException | None = None
        self._digest = hashlib.sha256()
        self._thread = threading.Thread(target=self._run, name="checkpoint-check")
        self._thread.start()

    def expect(self, offset: int, item: bytes | Target) -> None:
        """Say what the output has at an offset, once or before it is written."""
        with self._changed:
            self._tasks.append((offset, item))

    def advance(self, written: int) -> None:
        """Say up to which byte the output is as it will stay.

        Raises:
            CheckpointError: a difference was found.
        """
        with self._changed:
            self._written = written
            self._changed.notify()
        if self._failure is not None:
            raise self._failure

    def finish(self) -> str:
        """Return the SHA-256 of the output, once all of it was compared.

        Raises:
            CheckpointError: a difference was found.
        """
        while (task := self._take(-1)) is not None and self._failure is None:
            self._compare(*task)
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._digest.hexdigest()

    def stop(self) -> None:
        """End the thread, whatever it is at."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait():
                if self._hashed < self._written:
                    self._hash_chunk()
                elif (task := self._take(0)) is not None:
                    self._compare(*task)
        except BaseException as error:
            self._failure = error

    def _wait(self) -> bool:
        """Wait for something to do; return False when nothing will come any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or self._closed or self._hashed < self._written or self._ready
            )
            return not self._stopped and (self._hashed < self._written or not self._closed)

    @property
    def _ready(self) -> bool:
        return bool(self._tasks) and _end(*self._tasks[0]) <= self._written

    def _take(self, at: int) -> tuple[int, bytes | Target] | None:
        """Return the first or the last task, or None; the first only if it is written."""
        with self._changed:
            if not self._tasks or (at == 0 and not self._ready):
                return None
            return self._tasks.popleft() if at == 0 else self._tasks.pop()

    def _hash_chunk(self) -> None:
        view = self._readers.buffer[: self._written - self._hashed]
        _fill_view(self._descriptor, self._hashed, view, self._path)
        self._digest.update(view)
        self._hashed += len(view)

    def _compare(self, offset: int, item: bytes | Target) -> None:
        name, chunks = "the header", iter([memoryview(item)] if isinstance(item, bytes) else [])
        if not isinstance(item, bytes):
            name, chunks = item.name, target_bytes(item, self._readers)
        found = bytearray()
        for chunk in chunks:
            for begin in range(0, len(chunk), _CHUNK_BYTES):
                meant = chunk[begin : begin + _CHUNK_BYTES]
                found = found if len(found) == len(meant) else bytearray(len(meant))
                _fill_view(self._descriptor, offset, memoryview(found), self._path)
                # This way round it is one comparison of memory; a memoryview goes byte by byte.
                if found != meant:
                    raise CheckpointError(
                        f"{one_line(name)} reads back changed from {one_line(self._path)}; "
                        "check the disk, then convert again"
                    )
                offset += len(meant)


def _end(offset: int, item: bytes | Target) -> int:
    return offset + (len(item) if isinstance(item, bytes) else item.size_bytes)
