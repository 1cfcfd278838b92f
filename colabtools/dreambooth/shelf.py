"""What stands on the shelf: each session of a workspace in a few words."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from colabtools.dreambooth.captions import CAPTION_SUFFIXES
from colabtools.dreambooth.claims import find_holders
from colabtools.dreambooth.session import Session, find_session, session_names
from colabtools.dreambooth.trash import folder_bytes
from colabtools.errors import SessionError
from colabtools.storage import size_text, workspace_error

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from colabtools.drive import Workspace

__all__ = ["Summary", "list_sessions", "show_session"]

_STEP = re.compile(r"step-(\d{6,})")
_MODELS = frozenset({".ckpt", ".safetensors"})


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A session in a few words.

    Attributes:
        name: of the session and its folder.
        folder: where it is.
        base_model: what it is trained from; empty if that is not known yet.
        pictures: how many training pictures it has.
        captions: how many captions.
        packed: whether pictures are there as the zip of an older notebook alone, which the next
            `prepare` or `train` unpacks.
        steps: of the saved states, in order.
        models: exported files.
        runs: what was done with it, as "time verb".
        updated: when its record was last written.
        in_use: who writes to it, or did when last heard of.
        problem: why its record cannot be read; empty if all is well.
        size_bytes: all its files; None if they were not measured.
    """

    name: str
    folder: str
    base_model: str
    pictures: int
    captions: int
    packed: bool
    steps: tuple[int, ...]
    models: tuple[str, ...]
    runs: tuple[str, ...]
    updated: str
    in_use: tuple[str, ...]
    problem: str
    size_bytes: int | None

    def as_json(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def line(self) -> str:
        """One line of a list."""
        parts = [
            f"{self.pictures} pictures" if not self.packed else "pictures in a zip",
            f"step {self.steps[-1]}" if self.steps else "not trained",
            f"{len(self.models)} models",
        ]
        parts += [f"updated {self.updated}"] if self.updated else []
        parts += [f"in use: {who}" for who in self.in_use]
        parts += ["record damaged"] if self.problem else []
        return f"{self.name}: {', '.join(parts)}"

    def lines(self) -> list[str]:
        """Everything, one fact on a line."""
        size = "" if self.size_bytes is None else size_text(self.size_bytes)
        facts = {
            "session": self.name,
            "folder": self.folder,
            "base model": self.base_model or "not chosen yet",
            "pictures": "in a zip" if self.packed else str(self.pictures),
            "captions": str(self.captions),
            "saved steps": ", ".join(map(str, self.steps)) or "none",
            "models": ", ".join(self.models) or "none",
            "runs": "; ".join(self.runs) or "none",
            "size": size,
            "in use": "; ".join(self.in_use) or "no",
            "problem": self.problem,
        }
        return [f"{name}: {value}" for name, value in facts.items() if value]


def list_sessions(workspace: Workspace) -> list[Summary]:
    """Every session of a workspace, sorted by name; damaged ones too, with what is wrong.

    Raises:
        WorkspaceError: the storage failed.
    """
    return [
        _summarize(Session(name, workspace.sessions_dir / name), measure=False)
        for name in session_names(workspace)
    ]


def show_session(workspace: Workspace, name: str) -> Summary:
    """One session, measured.

    Raises:
        SessionError: there is no such session.
        WorkspaceError: the storage failed.
    """
    return _summarize(find_session(workspace, name), measure=True)


def _summarize(session: Session, *, measure: bool) -> Summary:
    from colabtools.images import PHOTO_SUFFIXES

    record, problem = _record(session)
    try:
        pictures = _files(session.instance_images_dir, PHOTO_SUFFIXES)
        return Summary(
            name=session.name,
            folder=str(session.folder),
            base_model=str(record.get("base_model", "")),
            pictures=len(pictures),
            captions=len(_files(session.captions_dir, CAPTION_SUFFIXES)),
            packed=not pictures and session.instance_images_dir.with_suffix(".zip").is_file(),
            steps=_steps(session.checkpoints_dir),
            models=tuple(_files(session.folder, _MODELS)),
            runs=tuple(map(_run_text, record.get("runs", []))),
            updated=str(record.get("updated", "")),
            in_use=tuple(map(str, find_holders(session.folder))),
            problem=problem,
            size_bytes=folder_bytes(session.folder) if measure else None,
        )
    except OSError as error:
        raise workspace_error("look into", session.folder, error) from error


def _record(session: Session) -> tuple[dict[str, Any], str]:
    try:
        return session.read_record(), ""
    except SessionError as error:
        return {}, str(error)


def _run_text(run: object) -> str:
    """What a user may have edited by hand is shown as it is."""
    if not isinstance(run, dict):
        return str(run)
    return f"{run.get('time', '')} {run.get('verb', '')}".strip()


def _files(folder: Path, suffixes: Collection[str]) -> list[str]:
    try:
        found = [path.name for path in folder.iterdir() if path.suffix.lower() in suffixes]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in found if not name.startswith("."))


def _steps(folder: Path) -> tuple[int, ...]:
    try:
        names = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return tuple(sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match))
