"""Who may write to a session: one runtime at a time, and the others are told.

Google Drive has no locks and no file that only one of two runtimes can make; their clocks differ,
and what one writes the other sees late. So each runtime that wants to write puts a claim, a file of
its own, into `Sessions/.leases/<name>/`, rewrites it every twenty seconds, and looks for others:

- A claim that changes while it is watched belongs to a living runtime. One that stands still for
  two minutes does not, and nor does one of this machine whose process is gone: that is known at
  once, so after a kill the same command goes on without waiting.
- Of two that claim at the same moment, the one with the smaller token stays. Both know it as soon
  as they see each other, at the latest at the next beat.
- Whoever finds that it was taken over is interrupted, and may not write any more.

On one machine a lock of the operating system decides, which a kill releases.
"""

from __future__ import annotations

import _thread
import hashlib
import os
import secrets
import socket
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colabtools.dreambooth.claims import (
    Holder,
    claim_bytes,
    claims_dir,
    find_holders,
    is_dead,
    machine_id,
    parse_claim,
    process_started,
    read_claims,
)
from colabtools.errors import SessionBusyError
from colabtools.report import get_logger
from colabtools.storage import is_remote, patiently, workspace_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Lease", "Timing", "ensure_held", "hold"]

_DYING_S = 3.0
_CHANCES = 20
# A Drive that hangs must not keep a run from ending.
_LONGEST_STOP_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How often a claim is rewritten, and how long one is watched, in seconds.

    Attributes:
        beat_s: between two rewritings.
        still_s: a claim that did not change for so long is a dead runtime's.
        settle_s: before a claim made behind a network counts, for others' claims to be seen.
        poll_s: between two looks at a claim that is watched.
    """

    beat_s: float = 20.0
    # Six beats: Drive may hold one back for a minute.
    still_s: float = 120.0
    settle_s: float = 2.0
    poll_s: float = 2.0


_TIMING = Timing()


class Lease:
    """The right to write to a session, kept by a thread that rewrites the claim.

    Attributes:
        lost: why the right is gone, empty while it is held.
    """

    def __init__(self, folder: Path, claim: Holder, timing: Timing) -> None:
        self.lost = ""
        self.claim = claim
        self._folder = folder
        self._path = claims_dir(folder) / f"{claim.token}.json"
        self._timing = timing
        self._main = threading.current_thread() is threading.main_thread()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="session-lease", daemon=True)

    def write(self) -> None:
        """Put the claim where others see it."""
        claims = self._path.parent
        for chance in range(_CHANCES):
            try:
                # One by one: a Drive that is no longer mounted must not be made up.
                for place in (*reversed(claims.parents[:3]), claims):
                    place.mkdir(exist_ok=True)
                self._path.write_bytes(claim_bytes(self.claim))
                return
            except (FileExistsError, FileNotFoundError):
                # The last one out of another session removes the folder of all claims.
                if chance == _CHANCES - 1:
                    raise

    def start(self) -> None:
        """Begin to keep it."""
        self._thread.start()

    def stop(self) -> None:
        """Give it back."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(_LONGEST_STOP_S)
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
        # The last one out; another's claim keeps the folder.
        with suppress(OSError):
            self._path.parent.rmdir()
            self._path.parent.parent.rmdir()

    def beat(self) -> None:
        """Look for those who took it over, and rewrite it; see `lost`."""
        for holder in map(
            parse_claim, read_claims(self._folder, without=self.claim.token).values()
        ):
            if holder is not None and self._yields_to(holder):
                self.lost = f"it was taken over by {holder}"
                return
        self.claim = Holder(**{**asdict(self.claim), "beat": self.claim.beat + 1})
        try:
            # In place: a new file each time would fill the bin of Drive.
            with self._path.open("r+b") as file:
                file.write(claim_bytes(self.claim))
                file.truncate()
        except FileNotFoundError:
            # An unmounted Drive has no sessions either; that is nobody's taking over.
            if self._folder.parent.is_dir():
                self.lost = "its claim was removed, which another runtime does that takes it over"

    def _yields_to(self, other: Holder) -> bool:
        if self.claim.token in other.taken:
            return True
        # Who has just come looks around first, and goes when it sees this claim.
        settled = other.beat > 0 and other.alive is not False
        return settled and other.token not in self.claim.taken and other.token < self.claim.token

    def _keep(self) -> None:
        while not self._stop.wait(self._timing.beat_s):
            try:
                self.beat()
            except OSError as error:
                # A Drive that dropped may come back, with the claim as it was.
                get_logger(__name__).debug("the session's claim could not be renewed: %s", error)
            if self.lost:
                get_logger(__name__).error(
                    "session %r is not ours any more: %s; nothing is written to it from here",
                    self._folder.name,
                    self.lost,
                )
                if self._main:
                    _thread.interrupt_main()
                return


@dataclass
class _Held:
    lease: Lease
    pid: int
    thread: int
    depth: int = 1


_held: dict[str, _Held] = {}
_guard = threading.Lock()


@contextmanager
def hold(
    folder: Path, verb: str, *, take_over: bool = False, timing: Timing | None = None
) -> Iterator[Lease]:
    """Keep the right to write to a session while the block runs.

    A block inside another of the same thread shares its lease.

    Args:
        folder: the session's folder; it need not exist.
        verb: what is done there, for others to read.
        take_over: take the right from a runtime on another machine without watching it first.
        timing: how long to watch and wait.

    Raises:
        SessionBusyError: another runtime or thread writes there, or took the session over before
            the block's end.
        WorkspaceError: the claim cannot be written.
    """
    key = str(folder.absolute())
    held = _enter(key, folder)
    if held is not None:
        try:
            yield held.lease
        finally:
            held.depth -= 1
        return
    with _machine_lock(folder):
        lease = _acquire(folder, verb, take_over, timing or _TIMING)
        with _guard:
            _held[key] = _Held(lease, os.getpid(), threading.get_ident())
        try:
            lease.start()
            yield lease
        except KeyboardInterrupt as interrupt:
            if lease.lost:
                raise _lost_error(folder, lease) from interrupt
            raise
        finally:
            with _guard:
                _held.pop(key, None)
            lease.stop()


def ensure_held(folder: Path) -> None:
    """Return unless this process writes to the session by a lease that was taken from it.

    Raises:
        SessionBusyError: another runtime has the session now.
    """
    held = _held.get(str(folder.absolute()))
    if held is not None and held.pid == os.getpid() and held.lease.lost:
        raise _lost_error(folder, held.lease)


def _enter(key: str, folder: Path) -> _Held | None:
    """The lease that this thread has already, one level deeper."""
    with _guard:
        held = _held.get(key)
        if held is None or held.pid != os.getpid():
            return None
        if held.thread != threading.get_ident():
            raise _busy(folder, "another thread of this process")
        held.depth += 1
        return held


def _acquire(folder: Path, verb: str, take_over: bool, timing: Timing) -> Lease:
    machine = machine_id()
    try:
        taken = _outlive(folder, take_over, timing)
        claim = Holder(
            token=f"{secrets.token_hex(8)}.{machine}.{os.getpid()}",
            verb=verb,
            machine=machine,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=process_started(os.getpid()) or 0.0,
            since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            taken=tuple(sorted(taken)),
        )
        lease = Lease(folder, claim, timing)
        try:
            patiently(lease.write, folder.parent)
            for token in taken:
                (claims_dir(folder) / f"{token}.json").unlink(missing_ok=True)
            if is_remote(folder.parent):
                time.sleep(timing.settle_s)
            _settle(folder, lease)
        except BaseException:
            lease.stop()
            raise
    except OSError as error:
        raise workspace_error("claim the session", folder, error) from error
    return lease


def _outlive(folder: Path, take_over: bool, timing: Timing) -> set[str]:
    """The tokens of claims that are dead, or are to be taken over; waits to tell where it must."""
    dead: set[str] = set()
    first = patiently(lambda: read_claims(folder), folder.parent)
    for token, data in first.items():
        holder = parse_claim(data)
        if holder is not None and holder.alive:
            raise _busy(folder, str(holder))
        if take_over or is_dead(token, holder):
            dead.add(token)
    watched = {token: data for token, data in first.items() if token not in dead}
    if not watched:
        return dead
    who = "; ".join(str(parse_claim(data) or "another runtime") for data in watched.values())
    get_logger(__name__).warning(
        "session %r was being written to by %s; watching for %.0f s whether that runtime lives",
        *(folder.name, who, timing.still_s),
    )
    end_s = time.monotonic() + timing.still_s
    while watched and time.monotonic() < end_s:
        time.sleep(timing.poll_s)
        now = read_claims(folder)
        watched = {token: data for token, data in watched.items() if token in now}
        for token, data in now.items():
            if token not in dead and data != watched.get(token):
                raise _busy(folder, str(parse_claim(data) or "another runtime"))
    return dead | watched.keys()


def _settle(folder: Path, lease: Lease) -> None:
    """Stand back where another claimed at the same moment and comes first, or was there before."""
    for token, data in read_claims(folder, without=lease.claim.token).items():
        other = parse_claim(data)
        if token in lease.claim.taken or is_dead(token, other):
            continue
        if other is None or other.beat > 0 or token < lease.claim.token:
            raise _busy(folder, str(other or "another runtime"))
    if is_remote(folder.parent):
        # Newcomers tell by the beat that this claim has settled.
        lease.beat()


def _busy(folder: Path, who: str) -> SessionBusyError:
    name = folder.name
    return SessionBusyError(
        f"session {name!r} is being written to by {who}; wait for it or stop it there, and if that "
        f"runtime is gone for good say: colabtools session release {name!r}"
    )


def _lost_error(folder: Path, lease: Lease) -> SessionBusyError:
    return SessionBusyError(
        f"session {folder.name!r} is not this runtime's any more: {lease.lost}; nothing more was "
        "written, go on over there"
    )


@contextmanager
def _machine_lock(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine out; a kill lets them in again at once."""
    try:
        import fcntl
    except ImportError:  # Windows: the claims alone have to do
        yield
        return
    # A process that was just killed may need a moment to be gone.
    end_s = time.monotonic() + _DYING_S
    key = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    place = Path(tempfile.gettempdir()) / f"colabtools-{os.getuid()}" / "leases"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(place / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield
        return
    try:
        # Not flock: a child that outlives a killed parent would go on holding that.
        while not _try(lambda: fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)):
            living = [str(holder) for holder in find_holders(folder) if holder.alive]
            if living or time.monotonic() > end_s:
                raise _busy(folder, *living[:1] or ["another process of this machine"])
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _try(call: Callable[[], object]) -> bool:
    try:
        call()
    except OSError:
        return False
    return True
