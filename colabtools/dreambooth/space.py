"""What takes room in a workspace, and how to get it back: sessions, states, pictures, the trash."""

from __future__ import annotations

import re
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from colabtools.dreambooth.session import find_session, session_names
from colabtools.dreambooth.trash import delete_session, empty_trash, folder_bytes
from colabtools.errors import SessionError
from colabtools.storage import size_text, workspace_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from colabtools.drive import Workspace

__all__ = ["Freed", "Item", "Kind", "free_items", "measure_space"]

Kind = Literal["session", "state", "samples", "class pictures", "cache", "kept aside", "trash"]

_STATE = re.compile(r"step-(\d{6,})")
# What `prepare` keeps aside of pictures and captions that it replaced.
_ASIDE = re.compile(r"(instance_images|captions)\.old-\d+")
# A folder on its way out; a kill may leave it, and nobody reads it any more.
_LEAVING = ".leaving-"
_TRASH = ".trash"
_FOLDERS: dict[str, Kind] = {
    ".cache": "cache",
    "class_images": "class pictures",
    "samples": "samples",
}
_NOTES: dict[str, str] = {
    "cache": "made again when needed",
    "class pictures": "drawn again when needed",
    "kept aside": "pictures or captions that others took the place of",
    "samples": "drawn pictures, for good",
    "session": "goes to the trash, from where it can be brought back",
    "state": "an older state",
    "trash": "deleted sessions, for good",
}


@dataclass(frozen=True, kw_only=True)
class Item:
    """Something in a workspace that takes room and may go.

    Attributes:
        kind: what it is.
        session: whose it is, empty for the trash.
        path: where it is.
        size_bytes: what all its files take.
        note: what its going means.
    """

    kind: Kind
    session: str
    path: Path
    size_bytes: int
    note: str

    def line(self) -> str:
        """One line of a list."""
        name = f" {self.path.name}" if self.kind in ("state", "kept aside") else ""
        of = f"{self.session}: " if self.session else ""
        return f"{of}{self.kind}{name}, {size_text(self.size_bytes)} ({self.note})"


@dataclass(frozen=True, kw_only=True)
class Freed:
    """How many bytes are free now, and how many will be once the trash is emptied."""

    freed_bytes: int
    trashed_bytes: int

    def line(self) -> str:
        """One line for a person."""
        done = f"freed {size_text(self.freed_bytes)}"
        if not self.trashed_bytes:
            return done
        return f"{done}; {size_text(self.trashed_bytes)} more once the trash is emptied"


def measure_space(workspace: Workspace) -> tuple[Item, ...]:
    """What may go from a workspace: each session before its parts, the trash last.

    Raises:
        WorkspaceError: the storage failed.
    """
    place = workspace.sessions_dir
    items: list[Item] = []
    try:
        for name in session_names(workspace):
            items.append(_item("session", name, place / name))
            items += _parts(name, place / name)
        if (place / _TRASH).is_dir():
            items.append(_item("trash", "", place / _TRASH))
    except OSError as error:
        raise workspace_error("measure", place, error) from error
    return tuple(items)


def free_items(workspace: Workspace, items: Iterable[Item]) -> Freed:
    """What was won by removing these; a whole session goes to the trash, the rest for good.

    Whoever calls this has asked the user a second time. The trash is emptied last, and then what
    has just come into it goes as well.

    Raises:
        SessionBusyError: another runtime is writing to a session; what came before it is gone.
        SessionError: something is not what was measured; nothing of it is touched.
        WorkspaceError: the storage failed.
    """
    chosen = tuple(dict.fromkeys(items))
    sessions = {item.session for item in chosen if item.kind == "session"}
    freed = trashed = 0
    for item in chosen:
        if item.kind not in ("session", "trash") and item.session not in sessions:
            freed += _remove(workspace, item)
    for name in sorted(sessions):
        trashed += delete_session(workspace, name).size_bytes
    if any(item.kind == "trash" for item in chosen):
        freed, trashed = freed + empty_trash(workspace).size_bytes, 0
    return Freed(freed_bytes=freed, trashed_bytes=trashed)


def _parts(name: str, folder: Path) -> Iterator[Item]:
    yield from _states(name, folder / "checkpoints")
    for part in sorted(folder.iterdir()):
        if not part.is_dir() or part.is_symlink():
            continue
        if part.name in _FOLDERS:
            yield _item(_FOLDERS[part.name], name, part)
        elif _ASIDE.fullmatch(part.name) or part.name.startswith(_LEAVING):
            yield _item("kept aside", name, part)


def _states(name: str, folder: Path) -> Iterator[Item]:
    found = [path for path in (folder.iterdir() if folder.is_dir() else ()) if path.is_dir()]
    states = [path for path in found if _STATE.fullmatch(path.name) and not path.is_symlink()]
    states.sort(key=lambda path: int(path.name.removeprefix("step-")))
    for path in states:
        newest = "the newest state: training would begin anew" if path == states[-1] else ""
        yield _item("state", name, path, newest)
    for path in sorted(path for path in found if path.name.startswith(_LEAVING)):
        yield _item("kept aside", name, path)


def _item(kind: Kind, session: str, path: Path, note: str = "") -> Item:
    size = folder_bytes(path)
    return Item(kind=kind, session=session, path=path, size_bytes=size, note=note or _NOTES[kind])


def _remove(workspace: Workspace, item: Item) -> int:
    """The bytes that were there; from the first moment on nobody sees half of it."""
    session = find_session(workspace, item.session)
    known = {part.path: part for part in _known(item.session, session.folder)}
    with session.writing("free space"):
        found = known.get(item.path)
        if found is None or found.kind != item.kind:
            raise SessionError(f"{item.path} is not there any more; measure again")
        leaving = item.path.with_name(f"{_LEAVING}{secrets.token_hex(4)}")
        try:
            size = folder_bytes(item.path)
            item.path.rename(leaving)
            shutil.rmtree(leaving)
            with suppress(OSError):
                leaving.rmdir()
        except OSError as error:
            raise workspace_error("remove", item.path, error) from error
    return size


def _known(name: str, folder: Path) -> tuple[Item, ...]:
    try:
        return tuple(_parts(name, folder))
    except OSError as error:
        raise workspace_error("measure", folder, error) from error
