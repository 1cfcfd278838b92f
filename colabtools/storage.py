"""The rule for writing what must outlive the runtime, on storage that may fail at any moment.

The rule: a temporary name in the same folder, fsync, verify by reading back, rename. Whoever
writes to a workspace goes through `write_atomic` or `atomic_path`, so a runtime that dies in the
middle leaves the old file whole.

Google Drive looks like a disk and is none: a file may appear some seconds after it was written, a
call may fail once, fsync and hard links may be missing. So behind a network what can be looked at
again is looked at again, and nothing here links, locks or maps a file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from colabtools.errors import (
    ColabToolsError,
    StorageFullError,
    StorageLostError,
    WorkspaceError,
)

__all__ = [
    "atomic_path",
    "is_remote",
    "patiently",
    "remove_parts",
    "sha256_of",
    "size_text",
    "workspace_error",
    "write_atomic",
]

_T = TypeVar("_T")
_CHUNK_BYTES = 1024**2

_DRIVE_DROPPED = "Google Drive or the disk dropped out: mount it again and run this step again"
_NO_ROOM = "free some room, on Drive empty the bin as well, and run this step again"
_NOT_ALLOWED = "choose a folder you may write to, or change its permissions"

_NEXT_STEPS = {
    errno.EACCES: _NOT_ALLOWED,
    errno.EDQUOT: _NO_ROOM,
    errno.EEXIST: "a file stands where a folder is needed: move it away or give another path",
    errno.EIO: _DRIVE_DROPPED,
    errno.ENOENT: "check that its folder exists and that Drive, if it is there, is still mounted",
    errno.ENOSPC: _NO_ROOM,
    errno.ENOTCONN: _DRIVE_DROPPED,
    errno.ENOTDIR: "a file stands where a folder is needed: move it away or give another path",
    errno.EPERM: _NOT_ALLOWED,
    errno.EROFS: "this place is read-only: choose another folder",
    errno.ESTALE: _DRIVE_DROPPED,
}

# These speak of the storage whatever file they name, even where a library lost the name.
_STORAGE_FAILURES = frozenset(
    {errno.EDQUOT, errno.EIO, errno.ENOSPC, errno.ENOTCONN, errno.EROFS, errno.ESTALE}
)
_OUT_OF_ROOM = frozenset({errno.EDQUOT, errno.ENOSPC})
_LOST = frozenset({errno.EIO, errno.ENOTCONN, errno.ESTALE})
# Behind a network these may be over at the next try; ENOENT is a file that has yet to appear.
_PASSING = frozenset({errno.EAGAIN, errno.EBUSY, errno.EIO, errno.ENOENT, errno.ETIMEDOUT})
_PAUSES_S = (0.2, 0.8, 3.0, 8.0)
# Google Drive is mounted through FUSE; overlay and tmpfs, which containers use, are local.
_REMOTE_FILE_SYSTEMS = ("9p", "afs", "ceph", "cifs", "drvfs", "fuse", "nfs", "smb")
_PART = re.compile(r"\.(?P<name>.+)-[0-9a-f]{8}\.part", re.DOTALL)
_PART_NAME_LENGTH = 40


@contextmanager
def atomic_path(
    path: str | os.PathLike[str], *, verify: Callable[[Path], object] | None = None
) -> Iterator[Path]:
    """A temporary path beside `path`; what the block writes there becomes `path` at its end.

    Until then an older `path` stays as it is, and if the block or the check fails it stays for
    good. The folder must exist: making it here would hide a Drive that is no longer mounted.

    Args:
        path: the file to make or replace.
        verify: called with the temporary path, complete and on disk; raises if it is not right.
            Behind a network it is called again, since the bytes may arrive late.

    Raises:
        WorkspaceError: the storage failed, or the block wrote nothing.
    """
    target = Path(path)
    name = target.name[:_PART_NAME_LENGTH]
    temporary = target.with_name(f".{name}-{secrets.token_hex(4)}.part")
    try:
        yield temporary
        if not _appears(temporary):
            raise WorkspaceError(f"nothing was written for {target}: write to the temporary path")
        patiently(lambda: _sync_file(temporary), target.parent)
        if verify is not None:
            patiently(lambda: verify(temporary), target.parent)
        temporary.replace(target)
        if not _appears(target):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(temporary))
        _sync_folder(target.parent)
    except OSError as error:
        if isinstance(error, WorkspaceError) or not _is_about(error, temporary):
            raise
        raise workspace_error("write", target, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_parts(path: str | os.PathLike[str], *, older_than_s: float = 0.0) -> None:
    """Remove what a killed process left of its temporary files beside a path, or in a folder.

    Only for the one who may write there: another's write under way would be lost.

    Args:
        path: a file, whose own temporary files go; or a folder, where all go.
        older_than_s: leave what was written to later than so many seconds ago.
    """
    place = Path(path)
    latest = time.time() - older_than_s
    folder = place if place.is_dir() else place.parent
    with suppress(OSError):
        for found in list(folder.iterdir()):
            part = _PART.fullmatch(found.name)
            ours = part and (folder == place or part["name"] == place.name[:_PART_NAME_LENGTH])
            if ours and (not older_than_s or found.stat().st_mtime < latest):
                found.unlink(missing_ok=True)


def patiently(act: Callable[[], _T], folder: Path) -> _T:
    """What `act` returns; behind a network a failure that may pass is tried again, for 12 s.

    That is a storage error that comes and goes, a file that is not there yet, and a check by one
    of our errors, which may have seen a file before all of it had arrived.
    """
    for pause_s in _PAUSES_S:
        try:
            return act()
        except (OSError, ColabToolsError) as error:
            number = error.errno if isinstance(error, OSError) else None
            if (number is not None and number not in _PASSING) or not is_remote(folder):
                raise
        time.sleep(pause_s)
    return act()


def _appears(path: Path) -> bool:
    """Whether a file is there, or appears where files may appear late."""
    if path.exists():
        return True
    with suppress(OSError):
        patiently(path.stat, path.parent)
        return True
    return False


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is behind a network, such as Google Drive, where a write takes long."""
    import psutil

    folder = Path(path).absolute()
    mounts = [m for m in psutil.disk_partitions(all=True) if folder.is_relative_to(m.mountpoint)]
    if not mounts:
        return False
    kind = max(mounts, key=lambda mount: len(mount.mountpoint)).fstype.lower()
    return kind.startswith(_REMOTE_FILE_SYSTEMS)


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Make or replace `path` with `data`, read back and compared before it takes the name.

    Raises:
        WorkspaceError: the storage failed, or gave back other bytes than it was given.
    """

    def verify(temporary: Path) -> None:
        if temporary.read_bytes() != data:
            raise WorkspaceError(
                f"cannot write {path}: the disk gave back other bytes than the {len(data)} it was "
                f"given; the file was left as it was, try again or use another disk"
            )

    def write() -> None:
        with atomic_path(path, verify=verify) as temporary:
            temporary.write_bytes(data)

    try:
        write()
    except WorkspaceError as error:
        # A folder that is not there is no matter of patience: Drive is no longer mounted.
        if error.errno not in _PASSING - {errno.ENOENT} or not is_remote(Path(path).parent):
            raise
        time.sleep(_PAUSES_S[0])
        write()


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file as 64 hex digits, read in small pieces.

    Raises:
        WorkspaceError: the file cannot be read to its end.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise workspace_error("read", path, error) from error
    return digest.hexdigest()


def workspace_error(doing: str, path: str | os.PathLike[str], error: OSError) -> WorkspaceError:
    """The WorkspaceError for an OSError met while `doing` something to `path`, errno kept.

    It is a StorageFullError or a StorageLostError where the errno says so.

    Its message has the system's own words, the path and the next step.
    """
    if error.errno is None:
        return WorkspaceError(f"cannot {doing} {path}: {error}")
    room = _free_text(Path(path)) if error.errno in _OUT_OF_ROOM else ""
    reason = f"{os.strerror(error.errno)} (errno {error.errno}{room})"
    next_step = _NEXT_STEPS.get(error.errno, "check the path and try again")
    kind: type[WorkspaceError] = WorkspaceError
    if error.errno in _OUT_OF_ROOM:
        kind = StorageFullError
    elif error.errno in _LOST:
        kind = StorageLostError
    failure = kind(f"cannot {doing} {path}: {reason}; {next_step}")
    failure.errno = error.errno
    return failure


def _is_about(error: OSError, temporary: Path) -> bool:
    """Whether the storage failed, rather than something else that the block happened to do."""
    return error.errno in _STORAGE_FAILURES or str(error.filename) == str(temporary)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            # Some FUSE and network file systems have no fsync; reading back has to do there.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _free_text(path: Path) -> str:
    for folder in (path, *path.parents):
        with suppress(OSError):
            return f", {size_text(shutil.disk_usage(folder).free)} free"
    return ""


def size_text(size_bytes: int) -> str:
    """A size as a person says it: 12 B, 3 kB, 45 MB, 6.7 GB."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
