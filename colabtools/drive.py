"""The workspace, the folder where a user's files outlive the runtime, and how it is opened.

It lies in one's own Google Drive, in a shared drive, or in a local folder. How files are written
there is the matter of `storage`, whose names can be had from here as well.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from colabtools import env
from colabtools.errors import MountError, StorageFullError, StorageLostError, WorkspaceError
from colabtools.storage import (
    atomic_path,
    is_remote,
    patiently,
    sha256_of,
    size_text,
    workspace_error,
    write_atomic,
)

__all__ = [
    "MOUNTPOINT",
    "Workspace",
    "atomic_path",
    "flush",
    "is_remote",
    "mount",
    "open_local",
    "sha256_of",
    "workspace_error",
    "write_atomic",
]

# Source: google.colab's own examples; other notebooks and habits rely on it.
MOUNTPOINT = "/content/drive"
_OWN, _SHARED = "MyDrive", "Shareddrives"
_PAUSES_S = (1.0, 5.0)


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
        """Bytes that can still be written here; on Google Drive at most, quotas are not all told.

        Raises:
            WorkspaceError: the folder is gone.
        """
        try:
            usage = shutil.disk_usage(self.root)
            # Some mounts know no sizes; writing will tell.
            return usage.free if usage.total else sys.maxsize
        except OSError as error:
            raise workspace_error("measure the free room of", self.root, error) from error

    def ensure_space(self, needed_bytes: int, what: str) -> None:
        """Return if `needed_bytes` fit here.

        Raises:
            StorageFullError: they do not; the message says what for and how much is missing.
        """
        free = self.free_bytes()
        if free < needed_bytes:
            missing = size_text(needed_bytes - free)
            failure = StorageFullError(
                f"no room for {what} in {self.root}: it needs {size_text(needed_bytes)} and "
                f"{size_text(free)} are free; free at least {missing} and run this step again"
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


def mount(
    place: str = _OWN,
    *,
    mountpoint: str = MOUNTPOINT,
    timeout_s: float = 120.0,
    probes: env.Probes | None = None,
) -> Workspace:
    """The workspace in a place, mounted where that is needed and proven to keep a file.

    Args:
        place: "MyDrive" or a folder in it, such as "MyDrive/art"; "Shareddrives/NAME" or a folder
            in it; or a local folder.
        mountpoint: where Drive is, or will be, mounted.
        timeout_s: how long mounting may take once the user has agreed.
        probes: answers in the place of the machine.

    Raises:
        MountError: Drive was refused, cannot be mounted here, or has no such shared drive.
        StorageFullError: there is no room for a file.
        StorageLostError: Drive was mounted and drops out.
        WorkspaceError: the folder cannot be made, written or read back.
    """
    inside = _inside_drive(place, Path(mountpoint))
    if inside is None:
        return open_local(place)
    if ".." in inside.parts:
        raise WorkspaceError(f"workspace {place!r} leads out of Drive; give a folder without '..'")
    _ensure_mounted(Path(mountpoint), timeout_s, probes)
    if inside.parts[0] == _SHARED:
        _ensure_shared(Path(mountpoint), inside)
    try:
        return open_local(Path(mountpoint, inside))
    except WorkspaceError as error:
        if inside.parts[0] != _SHARED or error.errno not in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
        ):
            raise
        raise MountError(
            f"shared drive {inside.parts[1]!r} lets you read only ({error}); ask its managers for "
            "the role Contributor or Content manager, or use another workspace"
        ) from error


def flush(probes: env.Probes | None = None) -> bool:
    """Wait until all that was written to Google Drive has arrived; False where none is mounted.

    Drive is unmounted by that: mount it again to go on.

    Raises:
        StorageLostError: not everything has arrived.
    """
    return env.flush_drive(probes)


def _inside_drive(place: str, mountpoint: Path) -> PurePosixPath | None:
    """The path of a place below the mountpoint, or None for a local folder."""
    path = PurePosixPath(place.strip())
    with suppress(ValueError):
        path = path.relative_to(mountpoint.as_posix())
    if path.is_absolute() or not path.parts or path.parts[0] not in (_OWN, _SHARED):
        return None
    if path.parts[0] == _SHARED and len(path.parts) == 1:
        raise WorkspaceError(f"workspace {place!r} names no shared drive; give {_SHARED}/NAME")
    return path


def _ensure_mounted(mountpoint: Path, timeout_s: float, probes: env.Probes | None) -> None:
    """Return once Drive is really there; google.colab prints and returns when it is not."""
    failure: WorkspaceError | None = None
    for pause_s in (0.0, *_PAUSES_S):
        time.sleep(pause_s)
        # Never asked for what is there: that opens a dialogue in the user's browser.
        stale = False
        try:
            if _is_mounted(mountpoint):
                return
        except OSError:
            stale = True
        try:
            force = stale or failure is not None
            env.mount_drive(
                str(mountpoint), force_remount=force, timeout_s=timeout_s, probes=probes
            )
            failure = None
            if patiently(lambda: _is_mounted(mountpoint), mountpoint):
                return
        except StorageLostError as error:
            failure = error
        except OSError as error:
            if isinstance(error, WorkspaceError):
                raise
            failure = workspace_error("use Google Drive at", mountpoint, error)
    raise failure or MountError(
        f"Google Drive is not mounted at {mountpoint} though no error was given; run the cell "
        "again and allow the access, or disconnect the runtime and start a new one"
    )


def _is_mounted(mountpoint: Path) -> bool:
    """Whether Drive is there; a folder of that name on the runtime's own disk is not.

    Raises:
        OSError: it was mounted, and what served it is gone.
    """
    try:
        (mountpoint / _OWN).stat()
    except FileNotFoundError:
        return False
    return is_remote(mountpoint / _OWN)


def _ensure_shared(mountpoint: Path, inside: PurePosixPath) -> None:
    """Return if the shared drive is there; a folder made in its place would be nowhere."""
    folder, name = mountpoint / _SHARED, inside.parts[1]
    try:
        if (folder / name).is_dir():
            return
        there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise workspace_error("look for shared drives in", folder, error) from error
    raise MountError(
        f"no shared drive {name!r}; there {'is ' + ', '.join(there) if there else 'are none'}: "
        "check the name, and that this account is a member"
    )
