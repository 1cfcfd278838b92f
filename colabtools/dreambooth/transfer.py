"""Sessions that come and go: from a folder or a zip into the workspace, and out as one zip.

What comes in is all there or not at all: it is built under a hidden name beside the sessions, read
back, opened once, and then renamed. What goes out is read back by the rules of what comes in.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import zipfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from colabtools.dreambooth.archive import Bounds, Entry, copy_entries, open_entries
from colabtools.dreambooth.captions import CAPTION_SUFFIXES
from colabtools.dreambooth.lease import hold
from colabtools.dreambooth.names import RULE, clean_name
from colabtools.dreambooth.session import Session, open_session
from colabtools.drive import Workspace
from colabtools.errors import SessionError, WorkspaceError
from colabtools.report import get_logger, progress
from colabtools.storage import atomic_path, patiently, remove_parts, workspace_error

if TYPE_CHECKING:
    import os

__all__ = ["INCOMING", "Exported", "Imported", "export_session", "import_session"]

INCOMING = ".incoming"
_CHUNK_BYTES = 1024**2
_PICTURES, _CAPTIONS = "instance_images", "captions"
_FOLDERS = frozenset({_PICTURES, _CAPTIONS, "checkpoints", "class_images", "logs", "samples"})
_FILES = frozenset({"session.json", f"{_PICTURES}.zip", f"{_CAPTIONS}.zip"})
_MODELS = frozenset({".ckpt", ".safetensors"})
# The earliest that a zip can say: the same files make the same bytes at any time.
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_PLAIN_FILE = 0o100644 << 16


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What came in.

    Attributes:
        session: the new session.
        asked: the name that was asked for, or that the source has; the session's may be another.
        files: how many came in.
        size_bytes: all of them together.
        left_out: files beside photos and captions that are no part of a session.
    """

    session: Session
    asked: str
    files: int
    size_bytes: int
    left_out: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The zip of a session, read back and compared, with the number and size of what it holds."""

    path: Path
    files: int
    size_bytes: int


def import_session(
    workspace: Workspace,
    source: str | os.PathLike[str],
    *,
    name: str = "",
    bounds: Bounds | None = None,
) -> Imported:
    """A new session from a folder or a zip, which is only read.

    That is a session of ours, one of the established notebook (`instance_images/`, `captions/`,
    `<name>.ckpt`, its zips), or photos with their captions beside them; each of them directly or
    some folders down. Models that carry the source's name get the session's.

    Args:
        workspace: where the session will be.
        source: the folder or the zip.
        name: of the session; that of the source if empty. What cannot be a folder is cleaned.
        bounds: what is too much.

    Raises:
        SessionBusyError: another runtime is writing to a session of this name.
        SessionError: there is such a session, or the source is not safe, damaged or none.
        WorkspaceError: there is no room, or the storage failed; nothing is left.
    """
    place = Path(source).expanduser().absolute()
    with open_entries(place, bounds or Bounds()) as found:
        top = _common_folder(found)
        former = top.name or (place.name if place.is_dir() else place.stem)
        session_name = clean_name(name or former)
        session = Session(session_name, workspace.sessions_dir / session_name)
        chosen = _arrange(found, place, top)
        entries = [_renamed(entry, former, session_name) for entry in chosen.values()]
        size = sum(entry.size_bytes for entry in entries)
        workspace.ensure_space(size, f"the session {session_name!r}")
        with hold(session.folder, "import"):
            _take_in(workspace, session, entries)
    if session_name != (name or former):
        get_logger(__name__).warning(
            "the session is called %r, since %r cannot be a folder: use %s",
            *(session_name, name or former, RULE),
        )
    return Imported(
        session=session,
        asked=name or former,
        files=len(entries),
        size_bytes=size,
        left_out=tuple(str(entry.path) for entry in found if str(entry.path) not in chosen),
    )


def export_session(
    workspace: Workspace, name: str, target: str | os.PathLike[str] = ""
) -> Exported:
    """One zip of a session that imports to the same bytes; the same session makes the same zip.

    Args:
        workspace: where the session is.
        name: of the session.
        target: the zip, which is replaced if there is one, or the folder for it; that of the
            workspace if empty.

    Raises:
        SessionBusyError: another runtime is writing to it.
        SessionError: there is no such session, or one of its files cannot be in a zip.
        WorkspaceError: there is no room, or the storage failed; an older zip stays.
    """
    session = open_session(workspace, name)
    path = _zip_path(session, Path(target or workspace.root).expanduser().absolute())
    digests: dict[str, str] = {}

    def verify(part: Path) -> None:
        if _digests(part) != digests:
            raise WorkspaceError(
                f"cannot write {path}: it reads back changed; try again or use another disk"
            )

    with session.writing("export"), open_entries(session.folder, Bounds()) as entries:
        size = sum(entry.size_bytes for entry in entries)
        remove_parts(path)
        Workspace(path.parent).ensure_space(size, f"the zip of session {session.name!r}")
        with atomic_path(path, verify=verify) as part:
            digests.update(_write_zip(part, session.name, entries))
    return Exported(path=path, files=len(digests), size_bytes=size)


def _common_folder(entries: list[Entry]) -> PurePosixPath:
    """The folders that everything is in, down to the first that is a part of a session."""
    common: list[str] = []
    parents = [entry.path.parent.parts for entry in entries]
    for level in zip(*parents, strict=False):
        if len(set(level)) > 1 or level[0] in _FOLDERS:
            break
        common.append(level[0])
    return PurePosixPath(*common)


def _arrange(entries: list[Entry], source: Path, top: PurePosixPath) -> dict[str, Entry]:
    """What is taken in, by the path that it has in the source, with the one in the session."""
    inside = {
        str(entry.path): replace(entry, path=entry.path.relative_to(top)) for entry in entries
    }
    if any(_is_of_session(entry.path) for entry in inside.values()):
        return inside
    return _arrange_photos(inside, source)


def _is_of_session(path: PurePosixPath) -> bool:
    if len(path.parts) > 1:
        return path.parts[0] in _FOLDERS
    return path.name in _FILES or path.suffix.lower() in _MODELS


def _arrange_photos(inside: dict[str, Entry], source: Path) -> dict[str, Entry]:
    """Photos and the captions beside them, each in the folder that a session has for it."""
    from colabtools.images import PHOTO_SUFFIXES

    flat = {name: entry for name, entry in inside.items() if len(entry.path.parts) == 1}
    photos = {n: e for n, e in flat.items() if e.path.suffix.lower() in PHOTO_SUFFIXES}
    if not photos:
        raise SessionError(
            f"{str(source)!r} holds neither a session nor photos; give a folder or zip with "
            f"{_PICTURES}/ in it, or with {', '.join(sorted(PHOTO_SUFFIXES))} files"
        )
    stems = {entry.path.stem for entry in photos.values()}
    captions = {
        name: entry
        for name, entry in flat.items()
        if entry.path.suffix.lower() in CAPTION_SUFFIXES and entry.path.stem in stems
    }
    return {
        **{n: replace(e, path=PurePosixPath(_PICTURES) / e.path) for n, e in photos.items()},
        **{n: replace(e, path=PurePosixPath(_CAPTIONS) / e.path) for n, e in captions.items()},
    }


def _renamed(entry: Entry, former: str, name: str) -> Entry:
    """The entry, a model of the source's name under that of the session."""
    model = re.compile(rf"{re.escape(former)}((_step_\d+)?\.(ckpt|safetensors|yaml))")
    match = model.fullmatch(str(entry.path))
    return replace(entry, path=PurePosixPath(f"{name}{match[1]}")) if match else entry


def _take_in(workspace: Workspace, session: Session, entries: list[Entry]) -> None:
    staging = workspace.sessions_dir / INCOMING / session.name
    try:
        if session.folder.exists() and (
            not session.folder.is_dir() or any(session.folder.iterdir())
        ):
            raise SessionError(
                f"there is a session {session.name!r} already; import under another name, or "
                "delete that one first"
            )
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        copy_entries(entries, staging, desc=f"importing {session.name}")
        record = Session(session.name, staging)
        if record.read_record().get("name", session.name) != session.name:
            record.update_record(name=session.name)
        if session.folder.is_dir():
            session.folder.rmdir()
        staging.rename(session.folder)
        patiently(lambda: open_session(workspace, session.name), workspace.sessions_dir)
    except OSError as error:
        if isinstance(error, WorkspaceError):
            raise
        raise workspace_error("import to", session.folder, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):
            staging.parent.rmdir()


def _zip_path(session: Session, target: Path) -> Path:
    path = target / f"{session.name}.zip" if target.is_dir() else target
    if path.suffix.lower() != ".zip":
        raise SessionError(
            f"{str(target)!r} is no zip; give a folder that exists, or a .zip in one"
        )
    if path.is_relative_to(session.folder.absolute()):
        raise SessionError(f"{str(target)!r} is in the session itself; give another folder")
    return path


def _write_zip(path: Path, name: str, entries: list[Entry]) -> dict[str, str]:
    """The SHA-256 of each file by its name in the zip, which is stored and not packed.

    Pictures and weights do not shrink, and what a packer makes changes with its version.
    """
    digests = {}
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive,
        progress(entries, desc=f"exporting {name}", unit="files") as each,
    ):
        for entry in each:
            info = zipfile.ZipInfo(f"{name}/{entry.path}", _ZIP_TIME)
            info.external_attr = _PLAIN_FILE
            info.create_system = 3  # Unix, whatever wrote it
            info.file_size = entry.size_bytes
            digest = hashlib.sha256()
            with entry.open() as source, archive.open(info, "w") as target:
                while chunk := source.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    target.write(chunk)
            digests[info.filename] = digest.hexdigest()
    return digests


def _digests(path: Path) -> dict[str, str]:
    """The SHA-256 of each file of a zip by its name, read as an import would."""
    found = {}
    with open_entries(path, Bounds()) as entries:
        for entry in entries:
            digest = hashlib.sha256()
            with entry.open() as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
            found[str(entry.path)] = digest.hexdigest()
    return found
