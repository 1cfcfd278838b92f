"""What every test may want: logging as it was, and a folder like Google Drive on a bad day."""

from __future__ import annotations

import errno
import io
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from colabtools import report, storage
from colabtools.dreambooth import lease


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Quiet and logging as they were: a command changes both for its whole process."""
    logger = logging.getLogger("colabtools")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    report.set_quiet(False)
    logger.handlers[:], level, logger.propagate = before
    logger.setLevel(level)


class FlakyFolder:
    """A real folder behind a network: calls on it fail, and files appear late, as a test asks.

    Attributes:
        root: the folder.
        late: how often a file that was just written or renamed is not there when looked at.
        no_fsync: whether fsync is missing, as on some mounts.
        slept: seconds that were waited for, none of them really.
        calls: how often each kind of call was made: "write", "read", "rename", "mkdir", "list".
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.late = 0
        self.no_fsync = False
        self.slept: list[float] = []
        self.calls: dict[str, int] = {}
        self._hidden: dict[str, int] = {}
        self._failures: dict[str, tuple[int, range]] = {}

    def fail(self, kind: str, number: int, *, first: int = 1, times: int = 10**9) -> None:
        """Let calls of a kind fail with an errno, from the first on, counted from now."""
        self.calls[kind] = 0
        self._failures[kind] = (number, range(first, first + times))

    def recover(self) -> None:
        """Let everything succeed again."""
        self._failures.clear()

    def holds(self, path: Any) -> bool:
        """Whether a path is in the folder."""
        try:
            text = os.fspath(path)
        except TypeError:
            return False
        return isinstance(text, str) and Path(text).is_relative_to(self.root)

    def check(self, kind: str, path: Any) -> None:
        """Count a call, and fail if it is its turn."""
        if not self.holds(path):
            return
        self.calls[kind] = self.calls.get(kind, 0) + 1
        number, turns = self._failures.get(kind, (0, range(0)))
        if self.calls[kind] in turns:
            raise OSError(number, os.strerror(number), os.fspath(path))

    def hide(self, path: Any) -> None:
        """Let a file that was written now appear late."""
        if self.late and self.holds(path):
            self._hidden[os.fspath(path)] = self.late

    def look(self, path: Any) -> None:
        """Fail if a file has yet to appear."""
        if self.holds(path) and self._hidden.get(os.fspath(path), 0) > 0:
            self._hidden[os.fspath(path)] -= 1
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))


@pytest.fixture
def flaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FlakyFolder:
    """A flaky folder, mounted from afar; nothing else is, and no pause is really waited for."""
    import psutil

    folder = FlakyFolder(tmp_path / "flaky")
    folder.root.mkdir()
    mounts = [
        SimpleNamespace(mountpoint="/", fstype="ext4"),
        SimpleNamespace(mountpoint=str(folder.root), fstype="fuse.drive"),
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda *, all: mounts)  # noqa: A006
    monkeypatch.setattr(storage, "time", SimpleNamespace(sleep=folder.slept.append, time=time.time))
    monkeypatch.setattr(lease, "_TIMING", lease.Timing(settle_s=0.001))
    monkeypatch.setattr(io, "open", _opening(folder, io.open))
    for name, kind in (("replace", "rename"), ("rename", "rename"), ("mkdir", "mkdir")):
        monkeypatch.setattr(os, name, _checked(folder, kind, getattr(os, name)))
    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, _checked(folder, "list", getattr(os, name)))
    monkeypatch.setattr(os, "stat", _looking(folder, os.stat))
    monkeypatch.setattr(os, "fsync", _syncing(folder, os.fsync))
    return folder


def _opening(folder: FlakyFolder, call: Callable[..., Any]) -> Callable[..., Any]:
    def opened(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        reading = mode in ("r", "rb", "rt")
        folder.check("read" if reading else "write", path)
        if reading or "+" in mode:
            folder.look(path)
        file = call(path, mode, *args, **options)
        if not reading and "+" not in mode:
            folder.hide(path)
        return file

    return opened


def _checked(folder: FlakyFolder, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def checked(path: Any, *args: Any, **options: Any) -> Any:
        folder.check(kind, path)
        result = call(path, *args, **options)
        if kind == "rename":
            folder.hide(args[0])
        return result

    return checked


def _looking(folder: FlakyFolder, call: Callable[..., Any]) -> Callable[..., Any]:
    def looked(path: Any, *args: Any, **options: Any) -> Any:
        folder.look(path)
        return call(path, *args, **options)

    return looked


def _syncing(folder: FlakyFolder, call: Callable[..., Any]) -> Callable[..., Any]:
    def sync(descriptor: int) -> None:
        if folder.no_fsync:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        call(descriptor)

    return sync
