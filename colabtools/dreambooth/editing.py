"""The captions of a session as a person edits them: every picture, and each text saved at once."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from colabtools.dreambooth.captions import CAPTION_SUFFIXES
from colabtools.dreambooth.lease import ensure_held
from colabtools.errors import DatasetError, WorkspaceError
from colabtools.images import PHOTO_SUFFIXES
from colabtools.storage import patiently, workspace_error, write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from colabtools.dreambooth.session import Session

__all__ = ["Captioned", "list_captions", "read_caption", "write_caption"]


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """A training picture and its caption.

    Attributes:
        picture: the picture's file.
        caption: its words on one line, empty if it has none.
        problem: what is wrong with them, empty if nothing is.
    """

    picture: Path
    caption: str
    problem: str


def list_captions(session: Session) -> tuple[Captioned, ...]:
    """The training pictures of a session, sorted by name; those with bad captions as well.

    Raises:
        DatasetError: there are no pictures yet.
        WorkspaceError: the folder cannot be read.
    """
    folder = session.instance_images_dir
    try:
        found = sorted(
            path
            for path in (folder.iterdir() if folder.is_dir() else ())
            if path.suffix.lower() in PHOTO_SUFFIXES and not path.name.startswith(".")
        )
    except OSError as error:
        raise workspace_error("read", folder, error) from error
    if not found:
        raise DatasetError(
            f"session {session.name!r} has no training pictures; "
            "run prepare with a folder of photos"
        )
    return tuple(_captioned(session, picture) for picture in found)


def _captioned(session: Session, picture: Path) -> Captioned:
    try:
        caption = read_caption(session, picture)
    except DatasetError as error:
        return Captioned(picture=picture, caption="", problem=str(error))
    problem = "" if caption else "empty" if _files(session, picture) else "missing"
    return Captioned(picture=picture, caption=caption, problem=problem)


def read_caption(session: Session, picture: Path) -> str:
    """The caption that training reads for a picture, on one line; empty if there is none.

    Raises:
        DatasetError: it is not UTF-8 text.
        WorkspaceError: the storage failed.
    """
    texts = (_read(path) for path in _files(session, picture))
    return next(filter(None, texts), "")


def write_caption(session: Session, picture: Path, text: str) -> str:
    """The caption that training reads now: this text on one line, read back from its file.

    It goes into the file that the picture's caption is in, or a new `.txt`. The text before it
    is lost only when the new one is on disk and was read back.

    Raises:
        DatasetError: the text cannot be stored, or another file still speaks for the picture.
        SessionBusyError: another runtime is writing to the session.
        WorkspaceError: the storage failed; the caption is what it was.
    """
    caption = " ".join(text.split())
    try:
        data = f"{caption}\n".encode()
    except UnicodeEncodeError as error:
        raise DatasetError(
            f"the caption of {picture.name} holds half a character ({error.reason}); type it again"
        ) from error
    with session.writing("edit captions"):
        ensure_held(session.folder)
        try:
            session.captions_dir.mkdir(exist_ok=True)
        except OSError as error:
            raise workspace_error("make", session.captions_dir, error) from error
        for path in _targets(session, picture, caption):
            write_atomic(path, data)

        def check() -> None:
            if (now := read_caption(session, picture)) != caption:
                raise DatasetError(
                    f"the caption of {picture.name} reads back as {now!r} and not as {caption!r}; "
                    f"look into {session.captions_dir}"
                )

        patiently(check, session.captions_dir)
    return caption


def _targets(session: Session, picture: Path, caption: str) -> list[Path]:
    """Where a caption goes: the file that is read now; an empty one silences all that are there."""
    files = _files(session, picture)
    if not files:
        return [session.captions_dir / f"{picture.stem}{CAPTION_SUFFIXES[0]}"]
    if not caption:
        return files
    filled = [path for path in files if _is_filled(path)]
    return (filled or files)[:1]


def _is_filled(path: Path) -> bool:
    try:
        return bool(_read(path))
    except DatasetError:
        # What cannot be read is what the person mends.
        return True


def _files(session: Session, picture: Path) -> list[Path]:
    """The caption files of a picture, in the order in which they are asked."""
    named = (session.captions_dir / f"{picture.stem}{suffix}" for suffix in CAPTION_SUFFIXES)
    return [path for path in named if _is_file(path)]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        # The picture's own suffix was shorter, and its name may be as long as can be.
        if error.errno != errno.ENAMETOOLONG:
            raise workspace_error("look for", path, error) from error
        return False


def _read(path: Path) -> str:
    try:
        # Notepad begins its files with a byte order mark.
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise DatasetError(f"caption {path} is not UTF-8 text; type it again or save it so") from (
            error
        )
    except OSError as error:
        if isinstance(error, WorkspaceError):
            raise
        raise workspace_error("read", path, error) from error
