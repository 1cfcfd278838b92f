"""Deleting a session: first into the trash, and from there by a second word."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colabtools.dreambooth.lease import hold
from colabtools.dreambooth.session import find_session
from colabtools.dreambooth.transfer import INCOMING
from colabtools.errors import SessionBusyError, WorkspaceError
from colabtools.storage import patiently, workspace_error

if TYPE_CHECKING:
    from colabtools.drive import Workspace

__all__ = ["Deleted", "Emptied", "delete_session", "empty_trash", "folder_bytes"]

_TRASH = ".trash"


@dataclass(frozen=True, kw_only=True)
class Deleted:
    """Where a session is now, and the room that emptying the trash would give back.

    Importing `place` brings it back.
    """

    name: str
    place: Path
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Emptied:
    """How many deleted sessions are gone for good, and the room that they took."""

    sessions: int
    size_bytes: int


def delete_session(workspace: Workspace, name: str) -> Deleted:
    """Move a session into the workspace's trash in one step; one with a damaged record as well.

    Raises:
        SessionBusyError: another runtime is writing to it.
        SessionError: there is no such session.
        WorkspaceError: it cannot be moved; it is where it was.
    """
    session = find_session(workspace, name)
    trash = workspace.sessions_dir / _TRASH
    with hold(session.folder, "delete"):
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        try:
            size = folder_bytes(session.folder)
            trash.mkdir(exist_ok=True)
            place = _free_place(trash, f"{session.name}.{stamp}")
            session.folder.rename(place)
            patiently(place.stat, trash)
        except OSError as error:
            raise workspace_error("move to the trash", session.folder, error) from error
    return Deleted(name=session.name, place=place, size_bytes=size)


def empty_trash(workspace: Workspace) -> Emptied:
    """Remove deleted sessions for good, and what killed imports left.

    On Google Drive the room is free once Drive's own bin is emptied as well.

    Raises:
        WorkspaceError: something cannot be removed; what is left goes the next time.
    """
    trash, incoming = workspace.sessions_dir / _TRASH, workspace.sessions_dir / INCOMING
    deleted = _inside(trash)
    size = sum(_remove(place) for place in deleted)
    for place in _inside(incoming):
        with (
            suppress(SessionBusyError),
            hold(workspace.sessions_dir / place.name, "empty the trash"),
        ):
            size += _remove(place)
    for folder in (trash, incoming):
        with suppress(OSError):
            folder.rmdir()
    return Emptied(sessions=len(deleted), size_bytes=size)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; links count as nothing and are not followed.

    Raises:
        OSError: it cannot be read.
    """
    size = 0
    with os.scandir(folder) as found:
        for item in found:
            if item.is_dir(follow_symlinks=False):
                size += folder_bytes(Path(item.path))
            elif item.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    size += item.stat(follow_symlinks=False).st_size
    return size


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise workspace_error("read", folder, error) from error


def _remove(place: Path) -> int:
    """The bytes that were there; nothing of it is left."""
    try:
        if place.is_symlink() or not place.is_dir():
            size = place.lstat().st_size
            place.unlink()
            return size
        size = folder_bytes(place)
        shutil.rmtree(place)
    except OSError as error:
        if isinstance(error, WorkspaceError):
            raise
        raise workspace_error("remove", place, error) from error
    return size


def _free_place(trash: Path, name: str) -> Path:
    place, number = trash / name, 1
    while place.exists():
        number += 1
        place = trash / f"{name}-{number}"
    return place
