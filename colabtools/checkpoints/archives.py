"""Where the entries of a zip archive of torch lie, for archives whose every number agrees.

An archive says everything twice, and readers differ in what they believe. Here both must say the
same, and nothing may be compressed, hidden, doubled or outside of the one folder.

Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.3; the names of entries are those that
torch 2.13 writes (torch/serialization.py, `_save`).
"""

from __future__ import annotations

import os
import re
import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from colabtools.checkpoints.headers import one_line
from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ZIP_START", "StoredFile", "read_archive"]

ZIP_START = b"PK\x03\x04"

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END_64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR_64 = struct.Struct("<IIQI")
_SIGN_LOCAL, _SIGN_CENTRAL, _SIGN_END = 0x04034B50, 0x02014B50, 0x06054B50
_SIGN_END_64, _SIGN_LOCATOR_64 = 0x06064B50, 0x07064B50
_MAX_32, _MAX_16 = 0xFFFFFFFF, 0xFFFF
_EXTRA_64 = 1

# A checkpoint of SDXL has 2,513 entries in 0.2 MB; each entry costs a read of its own.
_MAX_DIRECTORY_BYTES = 8 * 1024**2
_MAX_ENTRIES = 50_000
_ENCRYPTED = 0x1 | 0x40
# Between entries lies at most what repeats the sizes of one. The shortest entry has 31 bytes, so
# none can hide there from the directory.
_MAX_GAP_BYTES = 24
_NAME = re.compile(
    rb"([^/\\\0]+)/(data/[0-9]+|data\.pkl|version|byteorder|\.format_version|\.storage_alignment"
    rb"|\.data/serialization_id)"
)


@dataclass(frozen=True)
class StoredFile:
    """An entry: its bytes lie in the archive from `begin` up to `end`."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class _Row:
    """An entry as the directory at the end of an archive has it."""

    name: bytes
    offset: int
    size_bytes: int


def read_archive(file: BinaryIO, path: Path) -> dict[str, StoredFile]:
    """Return the entries of an archive by their names inside its one folder.

    Raises:
        CheckpointError: it is cut off, contradicts itself, or holds what torch does not write.
    """
    return _Reader(file, path).entries()


class _Reader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._descriptor = file.fileno()
        self._path = path
        self._size = os.fstat(self._descriptor).st_size

    def entries(self) -> dict[str, StoredFile]:
        begin, end, count = self._directory()
        rows = sorted(self._rows(self._read(begin, end - begin), count), key=lambda row: row.offset)
        found: dict[str, StoredFile] = {}
        folder, last, former = b"", 0, ""
        for row in rows:
            match = _NAME.fullmatch(row.name)
            if match is None:
                raise self._damaged(f"it has an entry {self._shown(row)}, which torch never writes")
            folder = folder or match[1]
            if match[1] != folder:
                raise self._damaged(f"{former} and {self._shown(row)} are in two folders")
            name = match[2].decode()
            if name in found:
                raise self._damaged(f"it has {name} twice")
            if row.offset < last:
                raise self._damaged(f"its entry {self._shown(row)} overlaps {former}")
            self._ensure_nothing_hides(last, row.offset)
            found[name] = self._stored(name, row, begin)
            last, former = found[name].end, self._shown(row)
        self._ensure_nothing_hides(last, begin)
        return found

    def _ensure_nothing_hides(self, begin: int, end: int) -> None:
        if end - begin > _MAX_GAP_BYTES:
            raise self._damaged(f"{end - begin} bytes at byte {begin} are in no entry")

    def _directory(self) -> tuple[int, int, int]:
        """Return where the directory begins and ends, and how many entries it has."""
        base = max(0, self._size - _MAX_16 - _END.size)
        tail = self._read(base, self._size - base)
        at = tail.rfind(_SIGN_END.to_bytes(4, "little"))
        if at < 0 or len(tail) - at < _END.size:
            raise CheckpointError(
                f"{one_line(self._path)} is cut off: it has {self._size} bytes and no directory of "
                "its archive; download it again"
            )
        _, disk, first_disk, here, count, size, begin, comment = _END.unpack_from(tail, at)
        if at + _END.size + comment != len(tail):
            raise self._damaged("bytes follow the end of its archive")
        end = base + at
        if disk or first_disk or here != count:
            raise self._damaged("it is a part of a divided archive")
        if wide := self._directory_64(end):
            pairs = zip((count, size, begin), (_MAX_16, _MAX_32, _MAX_32), wide[:3], strict=True)
            if any(narrow not in (full, true) for narrow, full, true in pairs):
                raise self._damaged("the directory of its archive is described in two ways")
            count, size, begin, end = wide
        if begin + size != end:
            raise self._damaged("the directory of its archive is not where it should be")
        if size > _MAX_DIRECTORY_BYTES or count > _MAX_ENTRIES:
            raise self._damaged(f"its archive has {count} entries")
        return begin, end, count

    def _directory_64(self, end: int) -> tuple[int, int, int, int] | None:
        """Return count, size, begin and end of the directory in 64 bits; None if it has none."""
        at = end - _LOCATOR_64.size
        if at < 0:
            return None
        sign, _, end_64, _ = _LOCATOR_64.unpack(self._read(at, _LOCATOR_64.size))
        if sign != _SIGN_LOCATOR_64:
            return None
        row = _END_64.unpack(self._read(end_64, _END_64.size))
        sign, length, _, _, disk, first_disk, here, count, size, begin = row
        if (
            sign != _SIGN_END_64
            or end_64 + 12 + length != at
            or disk
            or first_disk
            or here != count
        ):
            raise self._damaged("the directory of its archive is not where it should be")
        return count, size, begin, end_64

    def _rows(self, text: bytes, count: int) -> list[_Row]:
        rows, at = [], 0
        for _ in range(count):
            if at + _CENTRAL.size > len(text):
                raise self._damaged("the directory of its archive has too few entries")
            fields = _CENTRAL.unpack_from(text, at)
            sign, _, _, flags, method, _, _, _, packed, size, *lengths = fields
            name_length, _, comment_length = lengths[:3]
            begin, at = at + _CENTRAL.size, at + _CENTRAL.size + sum(lengths[:3])
            if sign != _SIGN_CENTRAL or at > len(text):
                raise self._damaged("the directory of its archive cannot be read")
            name = text[begin : begin + name_length]
            extra = text[begin + name_length : at - comment_length]
            size, packed, offset = self._wide(extra, size, packed, fields[-1])
            row = _Row(name, offset, size)
            self._ensure_plain(row, flags, method)
            self._ensure_size(row, packed)
            # Where Unix wrote the entry, the upper half of its attributes is what stat() said.
            if stat.S_IFMT(fields[-2] >> 16) not in (0, stat.S_IFREG):
                raise self._damaged(f"its entry {self._shown(row)} is a link or a folder")
            rows.append(row)
        if at != len(text):
            raise self._damaged("the directory of its archive has too many entries")
        return rows

    def _wide(self, extra: bytes, *narrow: int) -> list[int]:
        """Return numbers with those that need 64 bits taken from the extra field."""
        if _MAX_32 not in narrow:
            return list(narrow)
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<HH", extra, at)
            if kind == _EXTRA_64:
                wide = memoryview(extra)[at + 4 : at + 4 + length]
                needed = narrow.count(_MAX_32)
                if len(wide) < 8 * needed:
                    break
                numbers = iter(struct.unpack_from(f"<{needed}Q", wide))
                return [next(numbers) if each == _MAX_32 else each for each in narrow]
            at += 4 + length
        raise self._damaged("its archive lacks a size in 64 bits")

    def _stored(self, name: str, row: _Row, limit: int) -> StoredFile:
        """Return where the data of an entry are, which the header before them must confirm."""
        head = self._read(row.offset, _LOCAL.size + len(row.name))
        sign, _, flags, method, _, _, _, packed, size, *lengths = _LOCAL.unpack_from(head)
        named = head[_LOCAL.size :] == row.name and lengths[0] == len(row.name)
        if sign != _SIGN_LOCAL or not named:
            raise self._damaged(f"its entry {self._shown(row)} has another name before its data")
        self._ensure_plain(row, flags, method)
        if _MAX_32 in (size, packed):
            extra = self._read(row.offset + len(head), lengths[1])
            size, packed = self._wide(extra, size, packed)
        # Bit 3: the sizes follow the data, and stand here as zeros.
        if not flags & 0x8 or packed or size:
            self._ensure_size(row, size)
            self._ensure_size(row, packed)
        begin = row.offset + len(head) + lengths[1]
        if begin + row.size_bytes > limit:
            raise self._damaged(f"its entry {self._shown(row)} reaches past its data")
        return StoredFile(name, begin, begin + row.size_bytes)

    def _ensure_plain(self, row: _Row, flags: int, method: int) -> None:
        if method != 0 or flags & _ENCRYPTED:
            how = "encrypted" if flags & _ENCRYPTED else "compressed"
            raise self._damaged(f"its entry {self._shown(row)} is {how}")

    def _ensure_size(self, row: _Row, size_bytes: int) -> None:
        if size_bytes != row.size_bytes:
            sizes = f"{row.size_bytes} and {size_bytes} bytes"
            raise self._damaged(f"its entry {self._shown(row)} has two sizes, {sizes}")

    def _read(self, begin: int, count: int) -> bytes:
        if begin < 0 or begin + count > self._size:
            raise self._damaged("its archive points past its end")
        data = os.pread(self._descriptor, count, begin)
        if len(data) != count:
            raise CheckpointError(f"cannot read {one_line(self._path)} to its end; try again")
        return data

    def _shown(self, row: _Row) -> str:
        return one_line(row.name.decode("utf-8", "backslashreplace"))

    def _damaged(self, fault: str) -> CheckpointError:
        return CheckpointError(
            f"{one_line(self._path)} cannot be used: {fault}; get the model as .safetensors"
        )
