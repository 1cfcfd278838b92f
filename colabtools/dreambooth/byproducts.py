"""What a run leaves beside its states: it may fail without being the end of the run."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from colabtools.checkpoints.headers import read_safetensors_header
from colabtools.dreambooth.export import step_file, write_step_file
from colabtools.errors import (
    CheckpointError,
    ImageError,
    ModelError,
    SessionBusyError,
    SessionError,
)
from colabtools.report import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from colabtools.dreambooth.saved import Saved
    from colabtools.dreambooth.session import Session

__all__ = ["ensure_step_files", "spared"]


@contextmanager
def spared(what: str) -> Iterator[None]:
    """Let a run go on where something beside its states cannot be written, and say so.

    Raises:
        SessionBusyError: another runtime took the session over.
    """
    try:
        yield
    except SessionBusyError:
        raise
    except (OSError, CheckpointError, ImageError, ModelError, SessionError) as error:
        get_logger(__name__).warning("%s could not be written: %s", what, error)


def ensure_step_files(session: Session, states: Sequence[Saved], every: int) -> None:
    """Write the model file of each of these states whose step is a multiple of `every`.

    A file that is of the state already is left alone, so a run that was killed before it had
    written one, or that found no room for it, makes up for it later.

    Raises:
        CheckpointError: a number does not fit into the file, or it reads back changed.
        ModelError: the base model's files cannot be had.
        WorkspaceError: the storage failed.
    """
    for saved in states:
        if every and saved.step % every == 0 and not _is_there(session, saved):
            write_step_file(session, saved)


def _is_there(session: Session, saved: Saved) -> bool:
    path = step_file(session, saved)
    if not path.is_file():
        return False
    try:
        # A file of that name may be of a former run.
        return read_safetensors_header(path).metadata.get("sequence") == str(saved.sequence)
    except CheckpointError:
        return False
