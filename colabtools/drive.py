"""The workspace, the folder where a user's files outlive the runtime, and the rule for writing.

The rule: a temporary name in the same folder, fsync, verify by reading back, rename. Whoever
writes there goes through `write_atomic` or `atomic_path`, so a runtime that dies in the middle
leaves the old file whole.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from colabtools.errors import WorkspaceError

__all__ = [
    "Workspace",
    "atomic_path",
    "is_remote",
    "open_local",
    "sha256_of",
    "workspace_error",
    "write_atomic",
]

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
# Google Drive is mounted through FUSE; overlay and tmpfs, which containers use, are local.
_REMOTE_FILE_SYSTEMS = ("9p", "afs", "ceph", "cifs", "drvfs", "fuse", "nfs", "smb")
_OUT_OF_ROOM = frozenset({errno.EDQUOT, errno.ENOSPC})


@dataclass(frozen=True)
class Workspace:
    """A folder that outlives the runtime, and the places inside it."""

    root: Path

    @property
    def sessions_dir(self) -> Path:
        """Folder with one sub-folder per training session."""
        return self.root / "Fast-Dreambooth" / "Sessions"

    @property
    def sd_dir(self) -> Path:
        """Folder for the web UI's data: models, extensions, outputs."""
        return self.root / "sd"

    @property
    def internal_dir(self) -> Path:
        """Folder for our own caches and settings, never secrets."""
        return self.root / ".colabtools"

    def free_bytes(self) -> int:
        """Bytes that can still be written here.

        Raises:
            WorkspaceError: the folder is gone.
        """
        try:
            return shutil.disk_usage(self.root).free
        except OSError as error:
            raise workspace_error("measure the free room of", self.root, error) from error

    def ensure_space(self, needed_bytes: int, what: str) -> None:
        """Return if `needed_bytes` fit here.

        Raises:
            WorkspaceError: they do not; the message says what for and how much is missing.
        """
        free = self.free_bytes()
        if free < needed_bytes:
            missing = _size_text(needed_bytes - free)
            failure = WorkspaceError(
                f"no room for {what} in {self.root}: it needs {_size_text(needed_bytes)} and "
                f"{_size_text(free)} are free; free at least {missing} and run this step again"
            )
            failure.errno = errno.ENOSPC
            raise failure


def open_local(path: str | os.PathLike[str]) -> Workspace:
    """The workspace in a local folder, which is made if missing and proven to keep a file.

    Raises:
        WorkspaceError: the folder cannot be made, written or read back; nothing is left behind.
    """
    root = _requested_folder(os.fspath(path))
    missing: list[Path] = []
    try:
        missing = [folder for folder in (root, *root.parents) if not folder.exists()]
        root.mkdir(parents=True, exist_ok=True)
        _prove_writable(root)
    except BaseException as error:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise workspace_error("use as the workspace", root, error) from error
        raise
    return Workspace(root)


def _requested_folder(text: str) -> Path:
    if not text.strip() or "\0" in text:
        raise WorkspaceError(f"no workspace folder in {text!r}: give one, such as ~/colabtools")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise WorkspaceError(f"no home folder for {text!r}: give the full path") from error


def _prove_writable(folder: Path) -> None:
    probe = folder / f".colabtools-probe-{secrets.token_hex(4)}"
    try:
        write_atomic(probe, secrets.token_bytes(64))
    finally:
        probe.unlink(missing_ok=True)


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

    Raises:
        WorkspaceError: the storage failed, or the block wrote nothing.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name[:40]}-{secrets.token_hex(4)}.part")
    try:
        yield temporary
        if not temporary.exists():
            raise WorkspaceError(f"nothing was written for {target}: write to the temporary path")
        _sync_file(temporary)
        if verify is not None:
            verify(temporary)
        temporary.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        if isinstance(error, WorkspaceError) or not _is_about(error, temporary):
            raise
        raise workspace_error("write", target, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


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

    with atomic_path(path, verify=verify) as temporary:
        temporary.write_bytes(data)


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

    Its message has the system's own words, the path and the next step.
    """
    if error.errno is None:
        return WorkspaceError(f"cannot {doing} {path}: {error}")
    room = _free_text(Path(path)) if error.errno in _OUT_OF_ROOM else ""
    reason = f"{os.strerror(error.errno)} (errno {error.errno}{room})"
    next_step = _NEXT_STEPS.get(error.errno, "check the path and try again")
    failure = WorkspaceError(f"cannot {doing} {path}: {reason}; {next_step}")
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
            return f", {_size_text(shutil.disk_usage(folder).free)} free"
    return ""


def _size_text(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
