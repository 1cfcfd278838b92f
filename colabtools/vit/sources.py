"""Any number of pictures: from a folder, a pattern, archives or a table, listed before any is read.

A source knows the name of each picture and, without opening it, a stamp that changes with its
bytes. Reading is by number and from several threads at once.
"""

from __future__ import annotations

import glob
import os
import tarfile
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from colabtools.errors import DatasetError, ImageError
from colabtools.images import PHOTO_SUFFIXES, Encoded
from colabtools.vit.tables import is_table, open_table

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Source", "open_source"]

# What a member of an archive may take in memory.
_LARGEST_MEMBER_BYTES = 512 * 1024**2


class Source(Protocol):
    """Pictures by number."""

    @property
    def names(self) -> Sequence[str]:
        """Of each picture, as it is shown."""

    @property
    def stamps(self) -> Sequence[str]:
        """Of each picture, what changes when its bytes do."""

    @property
    def columns(self) -> pa.Table | None:
        """What a table says of each picture, None where there is none."""

    def read(self, number: int) -> Path | Encoded:
        """Return the file of a picture, on disk or in memory.

        Raises:
            ImageError: it cannot be had.
        """


@dataclass(frozen=True)
class _Files:
    """Files on disk."""

    names: Sequence[str]
    stamps: Sequence[str]
    paths: Sequence[Path]
    columns: None = None

    def read(self, number: int) -> Path:
        path = self.paths[number]
        if path.is_dir():
            raise ImageError(f"{path} is a folder, not a picture")
        return path


@dataclass(frozen=True)
class _Member:
    """A file inside an archive.

    Attributes:
        archive: its number.
        name: inside the archive.
        size: in bytes.
        place: where its bytes begin in a tar.
        fault: why it cannot be read, "" if it can.
    """

    archive: int
    name: str
    size: int
    place: int
    fault: str = ""


class _Archives:
    """Members of .zip and .tar files, read in place."""

    columns: None = None

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._members: list[_Member] = []
        self._zips: dict[int, zipfile.ZipFile] = {}
        self._lock = threading.Lock()
        self._descriptors: dict[int, int] = {}
        self.names: list[str] = []
        self.stamps: list[str] = []
        for number, path in enumerate(paths):
            found = self._list_zip(number) if path.suffix.lower() == ".zip" else self._tar(number)
            stat = path.stat()
            for member in found:
                self._members.append(member)
                self.names.append(f"{path.name}/{member.name}")
                self.stamps.append(f"{stat.st_size} {stat.st_mtime_ns} {member.place}")

    def read(self, number: int) -> Encoded:
        member = self._members[number]
        if member.fault:
            raise ImageError(f"{self.names[number]} {member.fault}")
        if member.size > _LARGEST_MEMBER_BYTES:
            raise ImageError(f"{self.names[number]} has {member.size} bytes; that is no photo")
        try:
            data = self._bytes(member)
        except (OSError, RuntimeError, NotImplementedError, EOFError, zipfile.BadZipFile) as error:
            raise ImageError(f"{self.names[number]} cannot be read ({error})") from error
        except Exception as error:  # what zlib, bz2 and lzma raise has no class in common
            raise ImageError(f"{self.names[number]} cannot be unpacked ({error})") from error
        if len(data) != member.size:
            raise ImageError(f"{self.names[number]} is cut short: the archive is not whole")
        return Encoded(member.name, data)

    def _bytes(self, member: _Member) -> bytes:
        if member.archive in self._zips:
            with self._zips[member.archive].open(member.name) as file:
                return file.read(member.size + 1)
        return os.pread(self._descriptors[member.archive], member.size, member.place)

    def _list_zip(self, number: int) -> list[_Member]:
        path = self._paths[number]
        try:
            archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise DatasetError(f"{path} cannot be read as a zip ({error})") from error
        self._zips[number] = archive
        found = [
            _Member(number, entry.filename, entry.file_size, place)
            for place, entry in enumerate(archive.infolist())
            if not entry.is_dir() and _is_photo(entry.filename)
        ]
        return _mark_repeated(found)

    def _tar(self, number: int) -> list[_Member]:
        path = self._paths[number]
        try:
            # "r:" takes no compressed file, in which nothing can be read in place.
            with tarfile.open(path, "r:") as archive:
                found = [
                    _Member(number, entry.name, entry.size, entry.offset_data)
                    for entry in archive
                    if entry.isreg() and _is_photo(entry.name)
                ]
        except (OSError, tarfile.TarError) as error:
            raise DatasetError(
                f"{path} cannot be read as an uncompressed tar ({error}); unpack it, or pack the "
                "pictures without compression, which gains nothing on them"
            ) from error
        self._descriptors[number] = os.open(path, os.O_RDONLY)
        return _mark_repeated(found)

    def __del__(self) -> None:
        for archive in self._zips.values():
            archive.close()
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def open_source(src: str, column: str = "auto") -> Source:
    """Return the pictures that a text names.

    Args:
        src: a picture, a folder (with all folders inside), a pattern such as "photos/*.jpg" or
            "shards/*.tar", a .zip or .tar, a .csv or .parquet table.
        column: of a table, the column of paths, addresses or pictures.

    Raises:
        DatasetError: there is nothing of the kind, or no picture in it.
    """
    place = Path(src).expanduser()
    try:
        paths = _paths(src, place)
    except OSError as error:
        raise DatasetError(f"cannot list {src} ({error}); check the path") from error
    source: Source
    if len(paths) == 1 and is_table(paths[0]):
        source = open_table(paths[0], column)
    elif paths and all(_is_archive(path) for path in paths):
        source = _Archives(paths)
    else:
        source = _files(paths, place if place.is_dir() else None)
    if not len(source.names):
        kinds = ", ".join(sorted(suffix[1:] for suffix in PHOTO_SUFFIXES))
        raise DatasetError(f"no picture in {src}; known kinds: {kinds}")
    return source


def _paths(src: str, place: Path) -> list[Path]:
    if place.is_dir():
        return _walk(place)
    if place.exists():
        return [place]
    if any(mark in src for mark in "*?["):
        found = glob.glob(str(place), recursive=True)  # noqa: PTH207 - of any root
        paths = sorted(Path(name) for name in found)
        archives = [path for path in paths if _is_archive(path)]
        return archives or [path for path in paths if _is_photo(path.name)]
    raise DatasetError(
        f"{src} is not there; give a picture, a folder, a pattern in quotes, a .zip, .tar, .csv or "
        ".parquet file"
    )


def _walk(folder: Path) -> list[Path]:
    """Return all pictures inside, in the order of their names; what is hidden is left out."""

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = [name for name in (*files, *folders) if _is_photo(name)]
        found += [Path(parent, name) for name in sorted(names)]
    return found


def _files(paths: Sequence[Path], folder: Path | None) -> _Files:
    names = [str(path.relative_to(folder)) if folder else str(path) for path in paths]
    return _Files(names, [_stamp(path) for path in paths], paths)


def _stamp(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:  # a link to nothing; reading it gives the reason
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _is_photo(name: str) -> bool:
    base = name.rpartition("/")[2]
    return PurePosixPath(base).suffix.lower() in PHOTO_SUFFIXES and not base.startswith(".")


def _is_archive(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-1:] in ([".zip"], [".tar"], [".tgz"]) or suffixes[-2:-1] == [".tar"]


def _mark_repeated(members: list[_Member]) -> list[_Member]:
    """Return the members, those that a later one of the same name would replace with a fault."""
    last = {member.name: member for member in members}
    fault = "is there again further on, as unpacking the archive would find it"
    return [
        member
        if last[member.name] is member
        else _Member(member.archive, member.name, member.size, member.place, fault)
        for member in members
    ]
