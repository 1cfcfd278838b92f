"""The checkpoints of a session: saved safely, found again, and never more than were asked for.

A session is often on a Drive that is slow, full or gone. So there are two places: the session's own
folder, and one on the machine. With staging a checkpoint is safe on the machine first and copied
while training goes on; without, the machine is where it goes when the session's folder fails.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from colabtools.dreambooth.lease import ensure_held
from colabtools.dreambooth.saved import (
    Saved,
    Snapshot,
    checkpoint_folders,
    copy_saved,
    find_saved,
    remove_folder,
    remove_litter,
    write_snapshot,
)
from colabtools.drive import workspace_error
from colabtools.errors import CheckpointError, WorkspaceError
from colabtools.report import get_logger

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from colabtools.dreambooth.session import Session

__all__ = [
    "LOCAL_KEEP",
    "CheckpointStore",
    "Kept",
    "Saved",
    "Snapshot",
    "find_trained",
    "latest_trained",
    "local_checkpoints_dir",
    "retained",
]

# What generate and export take is a checkpoint like any other.

# The machine's copies only bridge the time until the session has them.
LOCAL_KEEP = 2


class Kept(Protocol):
    """What decides whether a checkpoint is kept."""

    @property
    def step(self) -> int:
        """Updates done."""

    @property
    def finished(self) -> bool:
        """Whether it is the end of a run."""


K = TypeVar("K", bound=Kept)


def retained(rows: Sequence[K], keep_last: int, keep_every: int = 0) -> list[K]:
    """Return those that stay: the last few, every n-th, and the newest that is finished.

    What a finished run went on from goes, since its result was read back; every n-th stays.

    Args:
        rows: in the order of saving.
        keep_last: how many of the last.
        keep_every: those whose step is a multiple of it stay too; 0 for none.
    """
    finished = [number for number, row in enumerate(rows) if row.finished][-1:]
    first = len(rows) - (1 if rows and rows[-1].finished else keep_last)
    return [
        row
        for number, row in enumerate(rows)
        if number >= first or number in finished or _is_milestone(row, keep_every)
    ]


def _is_milestone(row: Kept, keep_every: int) -> bool:
    return keep_every > 0 and row.step % keep_every == 0


def local_checkpoints_dir(session: Session) -> Path:
    """Return the folder on this machine for the session's checkpoints; it need not exist.

    Raises:
        SessionError: the session's record is damaged.
    """
    # A session that was deleted and made anew under its name is another one.
    created = session.read_record().get("created", "")
    key = hashlib.sha256(f"{session.folder.absolute()}\0{created}".encode()).hexdigest()[:16]
    user = f"colabtools-{getattr(os, 'getuid', lambda: 0)()}"
    return Path(tempfile.gettempdir()) / user / "checkpoints" / f"{session.name}-{key}"


class CheckpointStore:
    """Saves and finds a session's checkpoints; close it, or use it in a `with`, before leaving."""

    def __init__(
        self,
        session: Session,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        staging: Path | None = None,
        fresh: bool = False,
    ) -> None:
        """Choose the places; nothing is written yet.

        Args:
            session: where the checkpoints belong.
            keep_last: how many of the last stay there.
            keep_every: those whose step is a multiple of it stay too; 0 for none.
            staging: folder on the machine that a checkpoint is written to before it is copied to
                the session; `local_checkpoints_dir` is the one that others look into too. Without
                it the session's own folder is written to.
            fresh: what former runs left is not looked at, and goes once the first checkpoint of
                this one is safe; their last result goes once this run has one.
        """
        self._session = session
        self._place = session.checkpoints_dir
        self._local = local_checkpoints_dir(session) if staging is None else staging
        self.staging = staging
        self.keep_last, self._keep_every = max(1, keep_last), keep_every
        self.fresh, self._oldest = fresh, 0
        self._sequence = 0
        # Checkpoints that are on the machine and not in the session, oldest first.
        self._unsent: list[Saved] = []
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> CheckpointStore:
        """Return the store."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close; a failure on the way does not hide the block's own."""
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception:
            get_logger(__name__).exception("closing the checkpoints failed as well")

    @property
    def session_folder(self) -> Path:
        """The session's own folder, where the room is needed."""
        return self._session.folder

    @property
    def stranded(self) -> Path | None:
        """Folder of the newest checkpoint if only this machine has it, or None."""
        unsent = list(self._unsent)
        return unsent[-1].folder if unsent else None

    def save(self, snapshot: Snapshot) -> Saved:
        """Return the checkpoint when a kill of the process can no longer lose it.

        Raises:
            CheckpointError: the snapshot holds what cannot be saved.
            SessionBusyError: another runtime took the session over.
            WorkspaceError: neither the session's folder nor the machine could keep it.
        """
        ensure_held(self._session.folder)
        if self.staging is None:
            self._join()
        self._next_sequence()
        first, second = (
            (self._local, self._place) if self.staging is not None else (self._place, self._local)
        )
        try:
            saved = self._write(first, snapshot)
        except OSError as error:
            saved = self._save_elsewhere(second, snapshot, workspace_error("save in", first, error))
        self._join()
        in_session = saved.folder.parent == self._place
        if in_session:
            self._rotate_session()
        else:
            self._unsent.append(saved)
        self._drop_superseded(saved)
        self._rotate_local()
        # Where the session's folder failed just now it is tried at the next save, or by `wait`.
        if self._unsent and (self.staging is not None or in_session):
            self._send()
        return saved

    def newest(self) -> Saved | None:
        """Return the newest checkpoint whose every byte is right, or None if none was ever saved.

        Damaged ones are skipped with a warning.

        Raises:
            CheckpointError: there are some and all are damaged.
            WorkspaceError: the session's folder cannot be read and the machine has none.
        """
        self._join()
        found, problems, unreadable = _survey(self._session, self._local)
        if self.fresh:
            # What a former run left is neither ours to go back to nor in our way.
            found = [saved for saved in found if 0 < self._oldest <= saved.sequence]
            problems = []
        for saved in reversed(found):
            if not (damage := saved.damage()):
                return saved
            problems.append(damage)
            _warn_skipped(damage)
        if unreadable is not None:
            raise unreadable
        if problems:
            raise CheckpointError(
                f"no checkpoint of session {self._session.name!r} is whole: {'; '.join(problems)}; "
                "set resume to never to start over"
            )
        return None

    def of_run(self) -> list[Saved]:
        """Return this run's checkpoints wherever they are, oldest first; lengths are checked.

        Raises:
            WorkspaceError: the session's folder cannot be read and the machine has none.
        """
        return [saved for saved in find_trained(self._session) if saved.sequence >= self._oldest]

    def send_stranded(self) -> None:
        """Begin to copy what only this machine has, of a run that could not write its session."""
        found, _, _ = _survey(self._session, self._local)
        there = [saved.sequence for saved in found if saved.folder.parent == self._place]
        newest = max(there, default=0)
        self._unsent = [
            saved
            for saved in found
            if saved.folder.parent == self._local
            and saved.sequence not in there
            and (saved.sequence > newest or _is_milestone(saved, self._keep_every))
            and not saved.damage(quick=True)
        ]
        if self._unsent:
            self._drop_superseded(self._unsent[-1])
            self._send()

    def in_session(self) -> list[Saved]:
        """Return the checkpoints in the session's folder, oldest first; lengths are checked.

        Raises:
            WorkspaceError: it cannot be read.
        """
        self._join()
        try:
            found, _ = find_saved(self._place)
        except OSError as error:
            raise workspace_error("look for checkpoints in", self._place, error) from error
        return [saved for saved in found if not saved.damage(quick=True)]

    def wait(self) -> None:
        """Return when no copy is under way; one that failed is tried once more. See `stranded`."""
        self._join()
        if self._unsent:
            self._send()
            self._join()

    def close(self) -> None:
        """Wait, as `wait` does."""
        self.wait()

    def remove_all(self) -> None:
        """Remove every checkpoint of the session, damaged ones too, here and on the machine.

        Raises:
            WorkspaceError: the storage failed.
        """
        self._join()
        self._unsent.clear()
        for place in (self._local, self._place):
            try:
                if place.is_dir():
                    remove_litter(place)
                    for folder in checkpoint_folders(place):
                        remove_folder(folder)
            except OSError as error:
                raise workspace_error("remove the checkpoints in", place, error) from error

    def _next_sequence(self) -> None:
        """Count on from what is there; by the clock, so that an unseen place is outrun as well."""
        if not self._sequence:
            found, _, _ = _survey(self._session, self._local)
            self._sequence = max((saved.sequence for saved in found), default=0)
        self._sequence = max(self._sequence + 1, time.time_ns() // 1_000_000)
        if self.fresh and not self._oldest:
            self._oldest = self._sequence

    def _write(self, place: Path, snapshot: Snapshot) -> Saved:
        if place == self._local:
            _make_private(place)
        return write_snapshot(place, snapshot, self._sequence)

    def _save_elsewhere(self, place: Path, snapshot: Snapshot, reason: WorkspaceError) -> Saved:
        self._join()
        try:
            saved = self._write(place, snapshot)
        except OSError as error:
            raise WorkspaceError(
                f"step {snapshot.step} could not be saved: {reason}; nor could it in {place}: "
                f"{workspace_error('save in', place, error)}"
            ) from error
        get_logger(__name__).warning(
            "step %d is saved in %s instead: %s", snapshot.step, saved.folder, reason
        )
        return saved

    def _drop_superseded(self, newest: Saved) -> None:
        """Forget unsent ones that the session would not keep beside the newest."""
        self._unsent = [
            saved
            for saved in self._unsent
            if saved is newest
            or (saved.step != newest.step and _is_milestone(saved, self._keep_every))
        ]

    def _send(self) -> None:
        self._thread = threading.Thread(target=self._copy, name="checkpoint-copy")
        self._thread.start()

    def _copy(self) -> None:
        """Copy what the session lacks, in a thread; whatever goes wrong is kept for the caller."""
        try:
            while self._unsent:
                ensure_held(self._session.folder)
                copy_saved(self._unsent[0], self._place)
                del self._unsent[0]
            self._rotate_session()
        except OSError as error:
            get_logger(__name__).warning(
                "the newest checkpoint is safe in %s, on this machine only: %s; it is tried again "
                "at the next save",
                self._unsent[-1].folder,
                workspace_error("copy it to", self._place, error),
            )
        except BaseException as error:
            self._failure = error

    def _join(self) -> None:
        """Wait for the copy under way and raise what it could not deal with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _rotate_session(self) -> None:
        self._rotate(self._place, self.keep_last, self._keep_every)

    def _rotate_local(self) -> None:
        self._rotate(self._local, min(LOCAL_KEEP, self.keep_last), 0)

    def _rotate(self, place: Path, keep_last: int, keep_every: int) -> None:
        """Remove what is no longer kept; a damaged one does not take the place of a whole one."""
        unsent = {saved.folder for saved in self._unsent}
        try:
            found, _ = find_saved(place)
            whole = [saved for saved in found if not saved.damage(quick=True)]
            ours = [saved for saved in whole if saved.sequence >= self._oldest]
            # What a former run achieved goes when this one has achieved as much.
            former = [saved for saved in whole if saved.sequence < self._oldest and saved.finished]
            rows = [*former[-1:], *ours]
            keep = {saved.folder for saved in retained(rows, keep_last, keep_every)} | unsent
            for saved in whole:
                if saved.folder not in keep:
                    remove_folder(saved.folder)
        except OSError as error:
            get_logger(__name__).warning("old checkpoints are left in %s: %s", place, error)


def find_trained(session: Session) -> list[Saved]:
    """Return the checkpoints with weights to use, the newest last; lengths are checked, bytes not.

    Raises:
        WorkspaceError: the session's folder cannot be read and the machine has none.
    """
    found, _, unreadable = _survey(session, local_checkpoints_dir(session))
    usable: dict[int, Saved] = {}
    for saved in found:
        if damage := saved.damage(quick=True):
            _warn_skipped(damage)
        elif saved.trained:
            usable.setdefault(saved.sequence, saved)
    if not usable and unreadable is not None:
        raise unreadable
    return list(usable.values())


def latest_trained(session: Session) -> Saved:
    """Return the newest weights of a session, of a finished run or of one under way.

    Those that are damaged are passed over with a warning.

    Raises:
        CheckpointError: there are none.
        WorkspaceError: the session's folder cannot be read and the machine has none.
    """
    found = find_trained(session)
    if not found:
        raise CheckpointError(f"session {session.name!r} has no trained weights; run train first")
    for saved in reversed(found):
        if not (damage := saved.damage()):
            return saved
        _warn_skipped(damage)
    raise CheckpointError(
        f"all {len(found)} states of session {session.name!r} are damaged; "
        "train it again with resume set to never"
    )


def _survey(session: Session, local: Path) -> tuple[list[Saved], list[str], WorkspaceError | None]:
    """Return what both places hold in the order of saving, what is wrong, and what was unreadable.

    Of two copies the machine's comes last, because it is the faster to read.
    """
    found: list[Saved] = []
    problems: list[str] = []
    unreadable = None
    for place in (session.checkpoints_dir, local):
        try:
            if place == local and place.exists() and not _is_ours(place):
                continue
            if place != local:
                # An unmounted Drive looks like a session that has saved nothing.
                session.folder.stat()
            rows, wrong = find_saved(place)
        except OSError as error:
            failure = workspace_error("look for checkpoints in", place, error)
            get_logger(__name__).warning("%s", failure)
            unreadable = unreadable if place == local else failure
            continue
        found += rows
        problems += wrong
    for problem in problems:
        _warn_skipped(problem)
    return sorted(found, key=lambda saved: saved.sequence), problems, unreadable


def _warn_skipped(problem: str) -> None:
    get_logger(__name__).warning("skipping a damaged checkpoint: %s", problem)


def _make_private(place: Path) -> None:
    """Make a folder on the machine that only this user can enter."""
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(place):
        raise PermissionError(errno.EPERM, "the folder belongs to another user", str(place))


def _is_ours(place: Path) -> bool:
    user = getattr(os, "getuid", None)
    return user is None or place.stat().st_uid == user()
