"""Claims on a session: the files by which runtimes tell each other that they write to it."""

from __future__ import annotations

import hashlib
import json
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Holder",
    "claim_bytes",
    "claims_dir",
    "find_holders",
    "is_dead",
    "machine_id",
    "parse_claim",
    "process_started",
    "read_claims",
]

_LEASES = ".leases"


@dataclass(frozen=True, kw_only=True)
class Holder:
    """What a claim says of its runtime.

    Attributes:
        token: the claim's own name: chance, which decides who comes first, then machine and
            process, which can be told even where a kill left nothing in the file.
        verb: what the runtime does with the session.
        machine: tells machines apart; a process number means something on its own only.
        host: the machine's name, for people.
        pid: its process.
        started: when that process began, so that a number given anew is not taken for it.
        since: when the claim was made, by that machine's clock; for people.
        beat: how often the claim was rewritten.
        taken: tokens of claims that it took over.
    """

    token: str
    verb: str
    machine: str
    host: str
    pid: int
    started: float
    since: str
    beat: int = 0
    taken: tuple[str, ...] = ()

    @property
    def alive(self) -> bool | None:
        """Whether its process runs; None where only watching can tell, on another machine."""
        if self.machine != machine_id():
            return None
        began = process_started(self.pid)
        return began is not None and abs(began - self.started) < 1

    def __str__(self) -> str:
        """What a person needs to find it."""
        place = "this machine" if self.machine == machine_id() else self.host
        return f"{self.verb} on {place}, process {self.pid}, since {self.since}"


def find_holders(folder: Path) -> tuple[Holder, ...]:
    """The claims on a session, those of dead processes of this machine left out.

    A claim of another machine may be a dead runtime's; only watching it would tell.
    """
    found = [parse_claim(data) for data in read_claims(folder).values()]
    return tuple(holder for holder in found if holder is not None and holder.alive is not False)


def is_dead(token: str, holder: Holder | None) -> bool:
    """Whether a claim is of this machine and its process gone."""
    if holder is not None:
        return holder.alive is False
    _, machine, pid = (token + "..").split(".")[:3]
    return machine == machine_id() and pid.isdecimal() and process_started(int(pid)) is None


def claims_dir(folder: Path) -> Path:
    """The folder of the claims on a session, beside it and hidden; it need not exist."""
    return folder.parent / _LEASES / folder.name


def read_claims(folder: Path, *, without: str = "") -> dict[str, bytes]:
    """The bytes of each claim by its token."""
    found: dict[str, bytes] = {}
    with suppress(FileNotFoundError):
        for path in sorted(claims_dir(folder).iterdir()):
            if path.suffix == ".json" and path.stem != without:
                with suppress(FileNotFoundError):
                    found[path.stem] = path.read_bytes()
    return found


def claim_bytes(claim: Holder) -> bytes:
    """A claim as its file holds it."""
    return json.dumps(asdict(claim), ensure_ascii=False).encode()


def parse_claim(data: bytes) -> Holder | None:
    """What a claim says; None while it is half written, or if another version wrote it."""
    try:
        values: dict[str, Any] = json.loads(data)
        return Holder(**{**values, "taken": tuple(values["taken"])})
    except (ValueError, TypeError, KeyError):
        return None


def machine_id() -> str:
    """What tells this machine, and on Linux this container, from all others."""
    try:
        # Process numbers count from one in each container.
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()]
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    except OSError:
        import psutil

        parts = [str(round(psutil.boot_time()))]
    return hashlib.sha256("\0".join([socket.gethostname(), *parts]).encode()).hexdigest()[:16]


def process_started(pid: int) -> float | None:
    """When a process of this machine began, or None if there is none that still runs."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
