"""A session: one subject's folder in the workspace, from its photos to its exported model."""

from __future__ import annotations

import json
import unicodedata
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from colabtools.drive import workspace_error, write_atomic
from colabtools.errors import SessionError, WorkspaceError

if TYPE_CHECKING:
    from pathlib import Path

    from colabtools.drive import Workspace

__all__ = ["SCHEMA_VERSION", "Session", "create_session", "now_text", "open_session"]

SCHEMA_VERSION = 1
_LONGEST_NAME = 64
# A file system's limit is 255; the rest is for what export and temporary files append.
_LONGEST_NAME_BYTES = 192
# Beside letters and digits of any script, what Drive, Windows and zip archives all take.
_PUNCTUATION = frozenset(" .+-_")


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

    def read_record(self) -> dict[str, Any]:
        """Return the record.

        Raises:
            SessionError: it is damaged, or a later version of this package wrote it.
            WorkspaceError: the storage failed.
        """
        try:
            text = self.record_path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {"schema_version": SCHEMA_VERSION, "name": self.name, "runs": []}
        except UnicodeDecodeError as error:
            raise self._damaged(error) from error
        except OSError as error:
            raise workspace_error("read", self.record_path, error) from error
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

    def _damaged(self, why: object) -> SessionError:
        return SessionError(
            f"{self.record_path} is damaged ({why}); rename it, the session works without it"
        )

    def update_record(self, **values: Any) -> None:
        """Write these values into the record; one that has them all already is left alone.

        Raises:
            SessionError: see `read_record`.
            WorkspaceError: it cannot be written.
        """
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
    session = _named(workspace, name)
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
    session = _named(workspace, name)
    if not session.folder.is_dir():
        folders = (p for p in workspace.sessions_dir.glob("*") if p.is_dir())
        there = sorted(p.name for p in folders if not p.name.startswith("."))
        raise SessionError(
            f"no session {name!r} in {workspace.sessions_dir}; "
            f"there {'is ' + ', '.join(there) if there else 'are none'}, run prepare first"
        )
    # Found now rather than at the end of an hour's training.
    session.read_record()
    return session


def _named(workspace: Workspace, name: str) -> Session:
    # A Mac composes letters another way; both spellings are one name.
    name = unicodedata.normalize("NFC", name)
    if not _can_be_folder(name):
        raise SessionError(
            f"session name {name!r} cannot be a folder; use up to {_LONGEST_NAME} letters, digits, "
            "spaces and . + - _ beginning with a letter or digit and ending with neither . nor a "
            "space"
        )
    return Session(name, workspace.sessions_dir / name)


def _can_be_folder(name: str) -> bool:
    # L letters, M the vowel signs and accents that some scripts write with marks, N digits.
    known = all(c in _PUNCTUATION or unicodedata.category(c)[0] in "LMN" for c in name)
    size_bytes = len(name.encode("utf-8", "replace"))
    fits = 0 < len(name) <= _LONGEST_NAME and size_bytes <= _LONGEST_NAME_BYTES
    # The first character keeps hidden folders and options out, the last what Windows drops.
    return known and fits and name[0].isalnum() and name[-1] not in " ." and ".." not in name
