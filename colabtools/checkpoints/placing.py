"""Outputs that are there whole or not at all, whatever ends the process meanwhile.

Where the file system can, an output has no name until it is verified: then even a kill leaves
nothing behind. Elsewhere it has a hidden name that the next conversion to the same target reuses.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from colabtools.checkpoints.headers import one_line
from colabtools.errors import WorkspaceError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Unplaced", "claim", "hidden_name", "place_folder", "sync", "sync_folder"]

_MODE = 0o666
_UNNAMED = getattr(os, "O_TMPFILE", None)


class Unplaced:
    """A file that has no name of its own yet; close it, or use it in a `with`."""

    def __init__(self, folder: Path, hidden: str) -> None:
        """Make it, empty.

        Args:
            folder: where its name will be, or beside it.
            hidden: the name it has where the file system has no files without names.

        Raises:
            OSError: the storage failed.
        """
        self._hidden = folder / hidden
        self._named = False
        if (descriptor := _open_unnamed(folder)) is not None:
            self.descriptor = descriptor
        else:
            self._hidden.unlink(missing_ok=True)
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
            self.descriptor = os.open(self._hidden, flags, _MODE)
            self._named = True

    def __enter__(self) -> Unplaced:
        """Return the file."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it; unless it was placed, nothing is left."""
        with suppress(OSError):
            os.close(self.descriptor)
        if self._named:
            with suppress(OSError):
                self._hidden.unlink(missing_ok=True)

    @property
    def path(self) -> Path:
        """A path that opens the file as it is now."""
        return self._hidden if self._named else Path(f"/proc/self/fd/{self.descriptor}")

    def reserve(self, size_bytes: int) -> None:
        """Take the room at once where that is cheap, else see that it is there.

        So a full disk is known before an hour of copying.

        Raises:
            OSError: there is not enough.
        """
        on_disk = os.major(os.fstat(self.descriptor).st_dev) != 0
        if size_bytes and on_disk and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.descriptor, 0, size_bytes)
            return
        # In memory it takes as long as the copying; behind a network it would write to each block.
        room = os.fstatvfs(self.descriptor)
        if room.f_blocks and room.f_bavail * room.f_frsize < size_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def place(self, target: Path) -> None:
        """Give the file its name, in the place of an older one of that name.

        Raises:
            OSError: the storage failed.
        """
        if not self._named:
            self._hidden.unlink(missing_ok=True)
            # Any descriptor, which an absolute path ignores, makes this follow the link.
            os.link(self.path, self._hidden, src_dir_fd=self.descriptor)
            self._named = True
        self._hidden.replace(target)
        self._named = False
        sync_folder(target.parent)


def _open_unnamed(folder: Path) -> int | None:
    """Return the number of a file without a name, or None where there are none."""
    if _UNNAMED is None:
        return None
    try:
        return os.open(folder, _UNNAMED | os.O_RDWR, _MODE)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.ENOENT, errno.ENOSPC, errno.EROFS):
            raise
        return None


def hidden_name(target: Path) -> str:
    """Return the hidden name for what becomes the target; the same every time."""
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]
    return f".{target.name[:40]}-{digest}.part"


def sync(descriptor: int) -> None:
    """Return once a file is on the disk, where its file system can say so.

    Raises:
        OSError: the storage failed.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some FUSE and network file systems have no fsync; reading back has to do there.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where its file system can.

    Raises:
        OSError: the storage failed.
    """
    if os.name == "nt":
        # Windows opens no folders, and needs no such thing.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def claim(target: Path) -> Iterator[None]:
    """Hold the only right on this machine to write the target, for the time of a block.

    Raises:
        WorkspaceError: another conversion is writing it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    key = hashlib.sha256(os.fsencode(target.parent.resolve() / target.name)).hexdigest()[:24]
    user = getattr(os, "getuid", lambda: 0)()
    lock = Path(tempfile.gettempdir()) / f"colabtools-{user}-{key}.lock"
    descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it has removed the file since: it is another one now.
            held = lock.stat().st_ino == os.fstat(descriptor).st_ino
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise WorkspaceError(
                f"another conversion is writing {one_line(target)}; wait for it, "
                "or give another name"
            )
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def place_folder(partial: Path, target: Path) -> None:
    """Give a folder its name; an older one of that name goes once the new one has it.

    Raises:
        OSError: the storage failed; the older one is back then.
    """
    former = target.with_name(f"{hidden_name(target)}-old")
    shutil.rmtree(former, ignore_errors=True)
    if target.exists():
        target.rename(former)
    try:
        partial.rename(target)
    except BaseException:
        with suppress(OSError):
            former.rename(target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(former, ignore_errors=True)
