"""Child processes: start one, read what it prints as it comes, wait for a line, stop it all.

A child leads a process group of its own, so stopping it also stops what it started, and it writes
straight into a private log file, so it lives on if this Python dies and its last words can be
attached to the error. Values given as `redact` never appear in a line, a tail or a message.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from colabtools.errors import ProcessError

__all__ = ["Child", "run"]

_POLL_S = 0.05
_KILL_WAIT_S = 5.0
_TAIL_BYTES = 16 * 1024
_TAIL_LINES = 30
_COMMAND_CHARS = 160


class Child:
    """A running child process and its log; one reader at a time. Make it with `Child.start`."""

    def __init__(
        self,
        popen: subprocess.Popen[bytes],
        *,
        command: str,
        log_path: Path,
        redact: Sequence[str] = (),
    ) -> None:
        """Watch a process that leads its own group and writes to `log_path`."""
        self.log_path = log_path
        self._popen = popen
        self._command = command
        self._redact = redact
        self._group_gone = False
        self._position = 0
        self._pending: deque[str] = deque()
        self._partial = ""
        # Progress bars end their lines with \r; the decoder turns every line end into \n.
        self._decoder = io.IncrementalNewlineDecoder(
            codecs.getincrementaldecoder("utf-8")("replace"), translate=True
        )

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        *,
        log_path: str | os.PathLike[str],
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        redact: Sequence[str] = (),
    ) -> Child:
        """The started child.

        Args:
            argv: the program and its arguments; no shell reads them.
            log_path: where its output goes, made anew and readable by this user only.
            env: its whole environment; None gives it ours.
            cwd: the folder it starts in; None for ours.
            redact: secret values to show as `***`.

        Raises:
            ProcessError: the program or the folder does not exist, or the log cannot be made.
        """
        command = _command_text(argv, redact)
        # A Python child would otherwise keep its lines in a buffer for minutes.
        environ = {"PYTHONUNBUFFERED": "1", **(os.environ if env is None else env)}
        try:
            with _open_private(Path(log_path)) as log:
                popen = subprocess.Popen(
                    list(argv),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environ,
                    cwd=cwd,
                    start_new_session=True,
                )
        except (OSError, ValueError, IndexError) as error:
            reason = _hide(str(error), redact)
            # Not chained: the original would carry the unredacted arguments.
            raise ProcessError(
                f"cannot start `{command}`: {reason}; check that the program is installed and "
                f"that the paths exist"
            ) from None
        return cls(popen, command=command, log_path=Path(log_path), redact=redact)

    @property
    def pid(self) -> int:
        """Process id, which is the id of the group as well."""
        return self._popen.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while the child runs."""
        return self._popen.poll()

    def lines(self, timeout_s: float | None = None) -> Iterator[str]:
        """Lines not read before, as they come, without line ends.

        Ends when the child has ended and all is read, or `timeout_s` after the call; a later call
        goes on where this one stopped.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            ended = self.poll() is not None  # asked first, so its last line cannot be missed
            self._read_new(final=ended)
            while self._pending:
                yield self._pending.popleft()
            if ended or (deadline is not None and time.monotonic() >= deadline):
                return
            time.sleep(_POLL_S)

    def wait_for(self, pattern: str | re.Pattern[str], timeout_s: float) -> re.Match[str]:
        """The match in the first new line that has one; lines up to it count as read.

        Raises:
            ProcessError: the child ended or `timeout_s` passed first.
        """
        regex = re.compile(pattern)
        for line in self.lines(timeout_s):
            match = regex.search(line)
            if match is not None:
                return match
        code = self.poll()
        wanted = _hide(repr(regex.pattern), self._redact)
        if code is None:
            raise self._failure(f"did not print {wanted} within {timeout_s:g} s")
        raise self._failure(f"{_ending(code)} before it printed {wanted}")

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit code, once the child has ended.

        Raises:
            ProcessError: it still runs after `timeout_s`; it is not stopped.
        """
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self._failure(f"still runs after {timeout_s:g} s") from None

    def stop(self, grace_s: float = 5.0) -> int:
        """The exit code, once the child and everything in its group have been ended.

        Asks with SIGTERM and, after `grace_s`, insists with SIGKILL; may be called again.
        """
        for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, _KILL_WAIT_S)):
            self._signal_group(number)
            if self._is_group_gone_within(patience_s):
                break
        return self._popen.wait()

    def log_tail(self, max_lines: int = _TAIL_LINES) -> str:
        """The last lines of the log, secrets replaced."""
        secret_bytes = max((len(value.encode()) for value in self._redact), default=0)
        try:
            with self.log_path.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                start = max(0, size - _TAIL_BYTES - secret_bytes)
                log.seek(start)
                text = _hide(log.read().decode("utf-8", "replace"), self._redact)
        except OSError:
            return ""
        # A secret cut in two by the start of the window has its rest in these first characters.
        text = text[secret_bytes:] if start else text
        return "\n".join(text.splitlines()[-max_lines:])

    def __enter__(self) -> Child:
        """The child itself; leaving the block stops it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the child and its group."""
        self.stop()

    def _read_new(self, *, final: bool) -> None:
        try:
            with self.log_path.open("rb") as log:
                log.seek(self._position)
                data = log.read()
        except OSError:
            data = b""
        self._position += len(data)
        *lines, self._partial = (self._partial + self._decoder.decode(data, final=final)).split(
            "\n"
        )
        if final and self._partial:
            lines.append(self._partial)
            self._partial = ""
        self._pending.extend(_hide(line, self._redact) for line in lines)

    def _signal_group(self, number: int) -> None:
        if not self._is_group_gone():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def _is_group_gone(self) -> bool:
        # Remembered, since the system may give the id of a group that is gone to a stranger.
        if not self._group_gone and self.poll() is not None:
            try:
                os.killpg(self.pid, 0)
            except (ProcessLookupError, PermissionError):
                self._group_gone = True
        return self._group_gone

    def _is_group_gone_within(self, patience_s: float) -> bool:
        deadline = time.monotonic() + patience_s
        while not self._is_group_gone():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def _failure(self, what: str, *, keep_log: bool = True) -> ProcessError:
        tail = self.log_tail()
        last_line = tail.splitlines()[-1].strip() if tail.strip() else ""
        said = f"its last line was {last_line!r}" if last_line else "it printed nothing"
        log = f"; its log is {self.log_path}" if keep_log else ""
        return ProcessError(f"`{self._command}` {what}; {said}{log}", log_tail=tail)


def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    redact: Sequence[str] = (),
) -> str:
    """What the command printed, standard output and error together, secrets replaced.

    Args:
        argv: the program and its arguments; no shell reads them.
        timeout_s: the command is stopped after this many seconds.
        env: its whole environment; None gives it ours.
        cwd: the folder it starts in; None for ours.
        redact: secret values to show as `***`.

    Raises:
        ProcessError: it cannot start, takes too long or ends with another code than 0.
    """
    with tempfile.TemporaryDirectory(prefix="colabtools-") as folder:
        log_path = Path(folder) / "log.txt"
        with Child.start(argv, log_path=log_path, env=env, cwd=cwd, redact=redact) as child:
            lines = list(child.lines(timeout_s))
            code = child.poll()
            if code is None:
                what = f"was stopped because it still ran after {timeout_s:g} s"
                raise child._failure(what, keep_log=False)
            if code != 0:
                raise child._failure(_ending(code), keep_log=False)
    return "".join(f"{line}\n" for line in lines)


def _open_private(path: Path) -> io.FileIO:
    """A new empty file that only this user can read, whatever was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
    return io.FileIO(os.open(path, flags, 0o600), "w")


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ", often because memory ran out" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"


def _command_text(argv: Sequence[str], redact: Sequence[str]) -> str:
    text = _hide(" ".join(argv), redact)
    return text if len(text) <= _COMMAND_CHARS else f"{text[:_COMMAND_CHARS]}..."


def _hide(text: str, redact: Sequence[str]) -> str:
    # Longest first: a secret may begin with a shorter one.
    for value in sorted(filter(None, redact), key=len, reverse=True):
        text = text.replace(value, "***")
    return text
