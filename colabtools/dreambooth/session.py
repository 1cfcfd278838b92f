"""A session: one subject's folder in the workspace, from its photos to its exported model."""

from __future__ import annotations

import json
import unicodedata
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from colabtools.dreambooth.archive import unpack_folder
from colabtools.dreambooth.lease import ensure_held, hold
from colabtools.dreambooth.names import check_name
from colabtools.errors import SessionError, WorkspaceError
from colabtools.storage import patiently, remove_parts, workspace_error, write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from colabtools.drive import Workspace

__all__ = [
    "SCHEMA_VERSION",
    "Session",
    "create_session",
    "find_session",
    "now_text",
    "open_session",
    "planned_session",
    "release_session",
    "session_names",
]

SCHEMA_VERSION = 1
# A temporary file of this age was left by a process that was killed.
_LITTER_AGE_S = 3600.0


@dataclass(frozen=True)
class Session:
    """Paths of a session, and its record `session.json`."""

    name: str
    folder: Path

    @property
    def instance_images_dir(self) -> Path:
        """The training pictures: upright RGB squares."""
        return self.folder / "instance_images"

    @property
    def captions_dir(self) -> Path:
        """One text file for each training picture, of the same stem."""
        return self.folder / "captions"

    @property
    def class_images_dir(self) -> Path:
        """Pictures of the class, drawn by the base model."""
        return self.folder / "class_images"

    @property
    def checkpoints_dir(self) -> Path:
        """Trained weights, one folder for each saved step."""
        return self.folder / "checkpoints"

    @property
    def samples_dir(self) -> Path:
        """Generated pictures."""
        return self.folder / "samples"

    @property
    def logs_dir(self) -> Path:
        """Metrics and the loss curve."""
        return self.folder / "logs"

    @property
    def record_path(self) -> Path:
        """The session's own record."""
        return self.folder / "session.json"

    @contextmanager
    def writing(self, verb: str, *, lead: bool = True) -> Iterator[None]:
        """Keep every other runtime from writing to the session while the block runs.

        What kills and older notebooks left is put right first: their temporary files go, and
        pictures and captions that are there as a zip alone are unpacked beside it.

        Args:
            verb: what is done, for others to read.
            lead: False in a process that only helps the one that holds the session.

        Raises:
            SessionBusyError: another runtime is writing to it, or took it over.
            SessionError: a zip of an older notebook is not safe to unpack.
            WorkspaceError: the storage failed.
        """
        if not lead:
            yield
            return
        with hold(self.folder, verb):
            if self.folder.is_dir():
                remove_parts(self.folder, older_than_s=_LITTER_AGE_S)
                for folder in (self.instance_images_dir, self.captions_dir):
                    unpack_folder(folder.with_suffix(".zip"), folder)
            yield

    def read_record(self) -> dict[str, Any]:
        """Return the record.

        Raises:
            SessionError: it is damaged, or a later version of this package wrote it.
            WorkspaceError: the storage failed.
        """
        try:
            text = patiently(self._read_text, self.folder)
        except UnicodeDecodeError as error:
            raise self._damaged(error) from error
        except OSError as error:
            raise workspace_error("read", self.record_path, error) from error
        if text is None:
            return {"schema_version": SCHEMA_VERSION, "name": self.name, "runs": []}
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._damaged(error) from error
        if not isinstance(record, dict):
            raise self._damaged("it holds no record")
        version = record.get("schema_version")
        if version != SCHEMA_VERSION:
            raise SessionError(
                f"{self.record_path} has schema version {version!r}, this package reads "
                f"{SCHEMA_VERSION}; update colabtools"
            )
        if not isinstance(record.get("runs"), list):
            raise self._damaged("it has no list of runs")
        return dict(record)

    def _read_text(self) -> str | None:
        try:
            return self.record_path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def _damaged(self, why: object) -> SessionError:
        return SessionError(
            f"{self.record_path} is damaged ({why}); rename it, the session works without it"
        )

    def update_record(self, **values: Any) -> None:
        """Write these values into the record; one that has them all already is left alone.

        Raises:
            SessionBusyError: another runtime took the session over.
            SessionError: see `read_record`.
            WorkspaceError: it cannot be written.
        """
        ensure_held(self.folder)
        record = self.read_record()
        if values.items() <= record.items():
            return
        record = {**record, **values, "updated": now_text()}
        write_atomic(self.record_path, json.dumps(record, indent=1, ensure_ascii=False).encode())

    def add_run(self, run: dict[str, Any]) -> None:
        """Add an entry to the record's history of runs."""
        self.update_record(runs=[*self.read_record()["runs"], {"time": now_text(), **run}])


def now_text() -> str:
    """Return the time as ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def create_session(workspace: Workspace, name: str) -> Session:
    """Return the session of this name, making its folder if there is none.

    Raises:
        SessionError: the name cannot be a folder's, or the session's record is damaged.
        WorkspaceError: the folder cannot be made; nothing is left of it.
    """
    session = planned_session(workspace, name)
    if session.record_path.exists():
        session.read_record()
        return session
    existed = session.folder.exists()
    try:
        session.folder.mkdir(parents=True, exist_ok=True)
        session.update_record(created=now_text())
    except BaseException as error:
        if not existed:
            with suppress(OSError):
                session.folder.rmdir()
        if isinstance(error, OSError) and not isinstance(error, WorkspaceError):
            raise workspace_error("make the session folder", session.folder, error) from error
        raise
    return session


def open_session(workspace: Workspace, name: str) -> Session:
    """Return the session of this name, which must exist.

    Raises:
        SessionError: the name cannot be a folder's, no such session is there, or its record is
            damaged.
    """
    session = find_session(workspace, name)
    # Found now rather than at the end of an hour's training.
    session.read_record()
    return session


def find_session(workspace: Workspace, name: str) -> Session:
    """The session of this name, which must exist; its record may be damaged.

    One of an older notebook may have a name that would not be given today.

    Raises:
        SessionError: no such session is there.
        WorkspaceError: the folder of the sessions cannot be read.
    """
    session = _find(workspace, name)
    if session is not None:
        return session
    check_name(name)
    there = session_names(workspace)
    raise SessionError(
        f"no session {name!r} in {workspace.sessions_dir}; "
        f"there {'is ' + ', '.join(there) if there else 'are none'}, run prepare first"
    )


def planned_session(workspace: Workspace, name: str) -> Session:
    """The session of this name, whose folder need not be there yet.

    Raises:
        SessionError: the name cannot be a folder's.
        WorkspaceError: the folder of the sessions cannot be read.
    """
    session = _find(workspace, name)
    if session is None:
        name = check_name(name)
        session = Session(name, workspace.sessions_dir / name)
    return session


def session_names(workspace: Workspace) -> list[str]:
    """The names of all sessions, sorted.

    Raises:
        WorkspaceError: their folder cannot be read.
    """
    place = workspace.sessions_dir
    try:
        folders = [path.name for path in place.iterdir() if path.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise workspace_error("look for sessions in", place, error) from error
    return sorted(name for name in folders if not name.startswith("."))


def release_session(workspace: Workspace, name: str) -> Session:
    """The session, taken from a runtime on another machine that holds it and is gone for good.

    One that still runs is interrupted as soon as it notices, and writes no more.

    Raises:
        SessionBusyError: a process of this machine holds it; stop that one.
        SessionError: no such session is there.
        WorkspaceError: the storage failed.
    """
    session = open_session(workspace, name)
    with hold(session.folder, "release", take_over=True):
        return session


def _find(workspace: Workspace, name: str) -> Session | None:
    """The session that is there under this name, as an older notebook or a Mac spelled it."""
    if name in ("", ".", "..") or name.startswith(".") or set(name) & set("/\\\0"):
        return None
    wanted = unicodedata.normalize("NFC", name)
    with suppress(OSError, ValueError):
        if (workspace.sessions_dir / wanted).is_dir():
            return Session(wanted, workspace.sessions_dir / wanted)
    for other in session_names(workspace):
        if unicodedata.normalize("NFC", other) == wanted:
            return Session(other, workspace.sessions_dir / other)
    return None
