"""Files that came from elsewhere: a folder or a zip is read only where each of its names is safe.

Whoever made a zip chose its names, its sizes and its kinds of entries. What would land outside the
folder, take another file's place, be no plain file, or be larger than it said is refused as a
whole, before anything is written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from colabtools.errors import SessionError, WorkspaceError
from colabtools.report import progress
from colabtools.storage import patiently, sha256_of, size_text, workspace_error

__all__ = ["Bounds", "Entry", "copy_entries", "open_entries", "unpack_folder"]

_CHUNK_BYTES = 1024**2
# Source: "Naming Files, Paths, and Namespaces" of the Windows documentation.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
# Control characters, the separator of Windows, and its drives.
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\]|^[A-Za-z]:")
_LONGEST_PART_BYTES, _DEEPEST = 255, 16
# What operating systems leave in folders and zips; nobody misses it.
_LITTER = frozenset({"__macosx", "desktop.ini", "thumbs.db"})
# Weights and pictures do not shrink; a hundredth of its size is a bomb's part, or an empty log.
_LARGEST_RATIO, _RATIO_FROM_BYTES = 200, 10 * 1000**2
_METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
_ENCRYPTED = 0x1
# In the list, an entry with a long name; the end of a zip with the longest remark.
_ENTRY_BYTES, _TAIL_BYTES = 1024, 22 + 65535 + 20
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What is too much to take in.

    Attributes:
        files: how many files.
        size_bytes: all of them together, unpacked.
    """

    files: int = 20_000
    size_bytes: int = 200 * 1000**3


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file to be taken in: where it goes, its size, and how it is read."""

    path: PurePosixPath
    size_bytes: int
    open: Callable[[], IO[bytes]]


@contextmanager
def open_entries(source: Path, bounds: Bounds) -> Iterator[list[Entry]]:
    """The files of a folder or a zip by their path in it, sorted, each of them safe to write.

    Hidden files and what operating systems leave are not among them.

    Raises:
        SessionError: a name, a kind, a size or the number of files is refused, or the zip is
            damaged; the message says which.
        WorkspaceError: the source cannot be read.
    """
    try:
        if source.is_dir():
            yield _checked(_entries_of_folder(source, bounds), source, bounds)
            return
        if not source.exists():
            raise SessionError(f"{str(source)!r} does not exist; give a folder or a zip")
        if not source.is_file() or not zipfile.is_zipfile(source):
            raise SessionError(f"{str(source)!r} is neither a folder nor a zip; give one of them")
        if _directory_bytes(source) > 2 * bounds.files * _ENTRY_BYTES:
            # Before it is read: the list alone may be made to fill the memory.
            raise SessionError(_too_many(source, bounds))
        with _open_zip(source) as archive:
            yield _checked(_entries_of_zip(archive, source, bounds), source, bounds)
    except _DAMAGE as error:
        raise _damaged(source, error) from error
    except OSError as error:
        if isinstance(error, WorkspaceError):
            raise
        raise workspace_error("read", source, error) from error


def copy_entries(entries: Iterable[Entry], folder: Path, desc: str) -> None:
    """Write files into a folder that is new, each read back and compared.

    Raises:
        SessionError: a file of a zip is not what the zip says.
        WorkspaceError: the storage failed.
    """
    with progress(list(entries), desc=desc, unit="files") as each:
        for entry in each:
            _copy(entry, folder / entry.path)


def unpack_folder(archive: Path, folder: Path) -> bool:
    """Unpack a zip that an older notebook left in the place of a folder; True if that was needed.

    The zip stays. Nothing is done where the folder holds anything, or there is no zip.

    Raises:
        SessionError: the zip is damaged or not safe.
        WorkspaceError: the storage failed.
    """
    try:
        if (folder.is_dir() and any(folder.iterdir())) or not archive.is_file():
            return False
        part = folder.with_name(f".{folder.name}.unpacked")
        shutil.rmtree(part, ignore_errors=True)
        with open_entries(archive, Bounds()) as entries:
            inside = [_below(entry, folder.name) for entry in entries]
            part.mkdir()
            copy_entries(inside, part, desc=f"unpacking {archive.name}")
        if folder.is_dir():
            folder.rmdir()
        part.rename(folder)
    except OSError as error:
        if isinstance(error, WorkspaceError):
            raise
        raise workspace_error("unpack", archive, error) from error
    return True


def _below(entry: Entry, name: str) -> Entry:
    """The entry without the leading folder that has the archive's own name."""
    parts = entry.path.parts
    path = PurePosixPath(*parts[1:]) if len(parts) > 1 and parts[0] == name else entry.path
    return Entry(path=path, size_bytes=entry.size_bytes, open=entry.open)


def _entries_of_folder(root: Path, bounds: Bounds) -> Iterator[Entry]:
    waiting, seen = [root], 0
    while waiting:
        folder = waiting.pop()
        with os.scandir(folder) as items:
            listed = sorted(items, key=lambda item: item.name)
        for item in listed:
            seen += 1
            if seen > 10 * bounds.files:
                raise SessionError(_too_many(root, bounds))
            path = PurePosixPath(Path(item.path).relative_to(root).as_posix())
            if _is_litter(path):
                continue
            if item.is_symlink():
                raise SessionError(
                    f"{str(path)!r} in {str(root)!r} is a link; put the file itself in its place"
                )
            if item.is_dir(follow_symlinks=False):
                waiting.append(Path(item.path))
            elif item.is_file(follow_symlinks=False):
                size = item.stat(follow_symlinks=False).st_size
                yield Entry(path=path, size_bytes=size, open=_opener(Path(item.path)))
            else:
                raise SessionError(f"{str(path)!r} in {str(root)!r} is no plain file; move it away")


def _opener(path: Path) -> Callable[[], IO[bytes]]:
    def opened() -> IO[bytes]:
        # It may have been made a link since it was looked at.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        return os.fdopen(descriptor, "rb")

    return opened


def _open_zip(source: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(source)
    except (ValueError, struct.error) as error:  # places and dates that cannot be
        raise _damaged(source, error) from error


def _directory_bytes(source: Path) -> int:
    """The size of a zip's list of entries, as it says itself; `zipfile` reads no more than that.

    Source: APPNOTE.TXT 6.3.10 of PKWARE, sections 4.3.14 to 4.3.16.
    """
    with source.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read()
        at = tail.rfind(b"PK\x05\x06")
        locator = tail[max(0, at - 20) : at] if at >= 0 else b""
        if locator[:4] == b"PK\x06\x07":
            file.seek(min(size, struct.unpack_from("<Q", locator, 8)[0]))
            record = file.read(56)
            if record[:4] == b"PK\x06\x06" and len(record) == 56:
                return int(struct.unpack_from("<Q", record, 40)[0])
    if at < 0 or len(tail) < at + 22:
        raise SessionError(f"{str(source)!r} is cut off; fetch it again")
    return int(struct.unpack_from("<I", tail, at + 12)[0])


def _entries_of_zip(archive: zipfile.ZipFile, source: Path, bounds: Bounds) -> Iterator[Entry]:
    infos = archive.infolist()
    if len(infos) > 2 * bounds.files:
        raise SessionError(_too_many(source, bounds))
    packed = sum(info.compress_size for info in infos)
    if packed > source.stat().st_size:
        raise SessionError(f"{str(source)!r} says it holds more than its own size; it is no backup")
    for info in infos:
        # `filename` has been cut at a NUL; what the archive says is `orig_filename`.
        name = info.orig_filename
        mode = stat.S_IFMT(info.external_attr >> 16)
        if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise SessionError(f"{name!r} in {str(source)!r} is a link or a device; {_REFUSED}")
        if info.is_dir() or mode == stat.S_IFDIR:
            _check_name(name.rstrip("/"), source)
            continue
        _check_name(name, source)
        if _is_litter(PurePosixPath(name)):
            continue
        if info.flag_bits & _ENCRYPTED:
            raise SessionError(f"{name!r} in {str(source)!r} is encrypted; unpack it yourself")
        if info.compress_type not in _METHODS:
            raise SessionError(
                f"{name!r} in {str(source)!r} is packed by method {info.compress_type}; pack it "
                "again as a plain zip"
            )
        large = info.file_size > _RATIO_FROM_BYTES
        if large and info.file_size > _LARGEST_RATIO * max(1, info.compress_size):
            raise SessionError(
                f"{name!r} in {str(source)!r} unpacks from {size_text(info.compress_size)} to "
                f"{size_text(info.file_size)}; {_REFUSED}"
            )
        yield Entry(
            path=PurePosixPath(name),
            size_bytes=info.file_size,
            open=_member(archive, info, source),
        )


def _member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, source: Path
) -> Callable[[], IO[bytes]]:
    def opened() -> IO[bytes]:
        try:
            return archive.open(info)
        except (ValueError, *_DAMAGE) as error:  # a ValueError for a place beyond any file
            raise _damaged(source, error) from error

    return opened


def _damaged(source: Path, error: Exception) -> SessionError:
    return SessionError(
        f"{str(source)!r} is damaged, or no zip that can be read ({error}); fetch it again"
    )


_REFUSED = "nothing was taken from it, look where it came from"


def _too_many(source: Path, bounds: Bounds) -> str:
    return f"{str(source)!r} holds more than {bounds.files} files; take out what is no session's"


def _is_litter(path: PurePosixPath) -> bool:
    return any(part.startswith(".") or part.lower() in _LITTER for part in path.parts)


def _check_name(name: str, source: Path) -> None:
    """Refuse a name that would leave the folder, or that not every storage can hold."""
    parts = name.split("/")
    reason = ""
    if not name or name.startswith("/") or "" in parts or "." in parts or ".." in parts:
        reason = "leads out of the folder"
    elif _FORBIDDEN.search(name):
        reason = "holds a character that some file systems refuse"
    elif any(_RESERVED.fullmatch(part) for part in parts):
        reason = "is a device on Windows"
    elif any(part[-1] in " ." for part in parts):
        reason = "ends with a dot or a space, which Windows drops"
    elif len(parts) > _DEEPEST or any(
        len(part.encode("utf-8", "replace")) > _LONGEST_PART_BYTES for part in parts
    ):
        reason = "is too long"
    elif any("\ud800" <= c <= "\udfff" for c in name):
        reason = "is no text"
    if reason:
        raise SessionError(
            f"the name {name!r} in {str(source)!r} {reason}; nothing was taken from it, rename the "
            "file there"
        )


def _checked(entries: Iterable[Entry], source: Path, bounds: Bounds) -> list[Entry]:
    """All entries, if they fit together into one folder and into the bounds."""
    found: list[Entry] = []
    total = 0
    for entry in entries:
        _check_name(str(entry.path), source)
        found.append(entry)
        total += entry.size_bytes
        if len(found) > bounds.files:
            raise SessionError(_too_many(source, bounds))
        if total > bounds.size_bytes:
            raise SessionError(
                f"{str(source)!r} holds more than {size_text(bounds.size_bytes)}; take out what is "
                "no session's"
            )
    _check_together([entry.path for entry in found], source)
    return sorted(found, key=lambda entry: entry.path.parts)


def _check_together(paths: list[PurePosixPath], source: Path) -> None:
    """Refuse two names that are one on Drive, Macs or Windows: by case, or by composed letters."""
    files: dict[str, str] = {}
    folders: dict[str, str] = {}

    def refuse(one: str, other: str) -> None:
        raise SessionError(
            f"{one!r} and {other!r} in {str(source)!r} are one name on many file systems; "
            "nothing was taken from it, rename one of them"
        )

    for path in paths:
        name = str(path)
        if (key := _key(name)) in files:
            refuse(files[key], name)
        files[key] = name
        for parent in path.parents:
            if (one := folders.setdefault(_key(str(parent)), str(parent))) != str(parent):
                refuse(one, str(parent))
    for key in files.keys() & folders.keys():
        refuse(files[key], folders[key])


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _copy(entry: Entry, target: Path) -> None:
    digest, size = hashlib.sha256(), 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with entry.open() as source, target.open("xb") as file:
            while chunk := source.read(_CHUNK_BYTES):
                size += len(chunk)
                if size > entry.size_bytes:
                    break
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            _sync(file.fileno())
    except OSError as error:
        raise workspace_error(f"copy {entry.path} to", target, error) from error
    if size != entry.size_bytes:
        raise SessionError(
            f"{str(entry.path)!r} has {size} bytes or more instead of {entry.size_bytes}; it is "
            "damaged, or was written to meanwhile: try again"
        )

    def verify() -> None:
        if sha256_of(target) != digest.hexdigest():
            raise WorkspaceError(
                f"{target} reads back changed; check the disk, or mount Drive again, and try again"
            )

    patiently(verify, target.parent)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some FUSE and network file systems have no fsync; reading back has to do there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
