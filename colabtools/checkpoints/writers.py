"""The two single-file formats, each as a sequence of bytes and tensors from first to last."""

from __future__ import annotations

import pickle
import struct
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from colabtools.checkpoints.headers import (
    PAGE_BYTES,
    encode_safetensors_header,
    one_line,
    read_safetensors_header,
)
from colabtools.checkpoints.verify import check_header
from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from colabtools.checkpoints.copying import Copier
    from colabtools.checkpoints.plan import Target

__all__ = ["CkptFormat", "FileFormat", "SafetensorsFormat", "format_of"]


class FileFormat(Protocol):
    """How a list of tensors becomes one file."""

    @property
    def targets(self) -> Sequence[Target]:
        """What it holds."""

    @property
    def size_bytes(self) -> int:
        """Length of the whole file."""

    def write(self, copier: Copier) -> None:
        """Write the file from its first byte to its last."""

    def reopen(self, opened: Path, shown: Path) -> None:
        """Return if the finished file has this layout when it is read as any other.

        Args:
            opened: opens the file, which may have no name yet.
            shown: what messages call it.

        Raises:
            CheckpointError: it has not.
        """


@dataclass(frozen=True)
class SafetensorsFormat:
    """A .safetensors file: a header, then the tensors without gaps."""

    targets: Sequence[Target]
    metadata: Mapping[str, str]

    @property
    def header(self) -> bytes:
        """What comes before the first tensor."""
        rows = [(target.name, target.dtype, target.shape) for target in self.targets]
        return encode_safetensors_header(rows, self.metadata, place=self._place)

    @property
    def _place(self) -> int | None:
        """Where in a page the first tensor lies in its source.

        If it is the same in the output whole pages are copied, or even shared, where the file
        system can; the longest run of a model is the one that comes first.
        """
        pieces = self.targets[0].pieces if self.targets and self.targets[0].copied else ()
        begin = pieces[0].source.begin + pieces[0].begin if pieces else 1  # type: ignore[union-attr]
        return begin % PAGE_BYTES if begin % 8 == 0 else None

    @property
    def size_bytes(self) -> int:
        """Length of the whole file."""
        return len(self.header) + sum(target.size_bytes for target in self.targets)

    def write(self, copier: Copier) -> None:
        """Write the file from its first byte to its last."""
        copier.literal(self.header)
        copier.targets(self.targets)

    def reopen(self, opened: Path, shown: Path) -> None:
        """Return if the finished file has this layout; see `FileFormat`."""
        header = check_header(read_safetensors_header(opened), shown, self.targets)
        if header.size_bytes != self.size_bytes:
            raise _other_layout(shown, f"{header.size_bytes} bytes instead of {self.size_bytes}")


# Each tensor of a .ckpt begins at a multiple of this, as torch's own do, so that it can be mapped.
_ALIGNMENT_BYTES = 64
# Source: APPNOTE.TXT 6.3.10, 4.3.7 to 4.3.16 and 4.5.3, for all layouts of the archive.
_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END_64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR_64 = struct.Struct("<IIQI")
_MAX_32, _MAX_16 = 0xFFFFFFFF, 0xFFFF
# 1 January 1980, the first day that the format knows: the same model gives the same bytes.
_DATE = 0x21
_VERSION, _VERSION_64 = 20, 45

# Source: torch 2.13, torch/storage.py, the typed storages that data.pkl names.
_STORAGES = {
    "BF16": "BFloat16Storage",
    "BOOL": "BoolStorage",
    "F16": "HalfStorage",
    "F32": "FloatStorage",
    "F64": "DoubleStorage",
    "I16": "ShortStorage",
    "I32": "IntStorage",
    "I64": "LongStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
}


@dataclass(frozen=True)
class _Entry:
    """A file in the archive; its data begins at `begin`."""

    name: bytes
    offset: int
    begin: int
    size_bytes: int

    @property
    def end(self) -> int:
        return self.begin + self.size_bytes

    def local_header(self, checksum: int) -> bytes:
        big = self.size_bytes >= _MAX_32
        size = _MAX_32 if big else self.size_bytes
        extra = struct.pack("<HHQQ", 1, 16, self.size_bytes, self.size_bytes) if big else b""
        padding = self.begin - self.offset - _LOCAL.size - len(self.name) - len(extra) - 4
        # Source: caffe2/serialize/inline_container.cc of torch, which pads in a field called FB.
        extra += b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        version = _VERSION_64 if big else _VERSION
        fields = (0x04034B50, version, 0, 0, 0, _DATE, checksum, size, size)
        return _LOCAL.pack(*fields, len(self.name), len(extra)) + self.name + extra

    def central_header(self, checksum: int) -> bytes:
        wide = [self.size_bytes] * 2 if self.size_bytes >= _MAX_32 else []
        wide += [self.offset] if self.offset >= _MAX_32 else []
        extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        version = _VERSION_64 if wide else _VERSION
        size, offset = min(self.size_bytes, _MAX_32), min(self.offset, _MAX_32)
        fields = (0x02014B50, version, version, 0, 0, 0, _DATE, checksum, size, size)
        tail = (len(self.name), len(extra), 0, 0, 0, 0, offset)
        return _CENTRAL.pack(*fields, *tail) + self.name + extra


@dataclass(frozen=True)
class CkptFormat:
    """A .ckpt file: a stored zip archive with `archive/{data.pkl,data/N,version}` and no more.

    That is what the safe unpicklers of the web UIs admit; torch's own writer has added entries to
    the archive since, which they refuse.
    Source: modules/safe.py of AUTOMATIC1111/stable-diffusion-webui 1.10.1.
    """

    targets: Sequence[Target]

    @property
    def size_bytes(self) -> int:
        """Length of the whole file."""
        entries = self._entries()
        return entries[-1].end + len(self._directory(entries, [0] * len(entries)))

    def write(self, copier: Copier) -> None:
        """Write the file from its first byte to its last."""
        first, *tensors, last = self._entries()
        checksums = [_literal(copier, first, self._pickle())]
        for entry, target in zip(tensors, self.targets, strict=True):
            size_bytes = entry.begin - entry.offset
            checksums.append(copier.after_header(target, size_bytes, entry.local_header))
        checksums.append(_literal(copier, last, _FORMAT_VERSION))
        copier.literal(self._directory([first, *tensors, last], checksums))

    def reopen(self, opened: Path, shown: Path) -> None:
        """Return if the finished file has this layout; see `FileFormat`."""
        try:
            with zipfile.ZipFile(opened) as archive:
                found = {
                    row.filename: (row.header_offset, row.file_size) for row in archive.filelist
                }
                count = len(archive.filelist)
        except (OSError, zipfile.BadZipFile) as error:
            raise _other_layout(shown, f"no readable archive ({error})") from error
        entries = self._entries()
        meant = {entry.name.decode(): (entry.offset, entry.size_bytes) for entry in entries}
        if found != meant or count != len(entries):
            raise _other_layout(shown, "other entries than were written")

    def _entries(self) -> list[_Entry]:
        sizes = [len(self._pickle()), *(target.size_bytes for target in self.targets)]
        names = ["data.pkl", *(f"data/{number}" for number in range(len(self.targets)))]
        entries, offset = [], 0
        pairs = zip([*names, "version"], [*sizes, len(_FORMAT_VERSION)], strict=True)
        for name, size in pairs:
            encoded = f"archive/{name}".encode()
            header = _LOCAL.size + len(encoded) + (20 if size >= _MAX_32 else 0) + 4
            begin = offset + header + -(offset + header) % _ALIGNMENT_BYTES
            entries.append(_Entry(encoded, offset, begin, size))
            offset = entries[-1].end
        return entries

    def _directory(self, entries: list[_Entry], checksums: list[int]) -> bytes:
        rows = b"".join(map(_Entry.central_header, entries, checksums))
        begin, count = entries[-1].end, len(entries)
        end = begin + len(rows)
        wide = b""
        if end >= _MAX_32 or count >= _MAX_16:
            sizes = (count, count, len(rows), begin)
            wide = _END_64.pack(0x06064B50, 44, _VERSION_64, _VERSION_64, 0, 0, *sizes)
            wide += _LOCATOR_64.pack(0x07064B50, 0, end, 1)
        few, low = min(count, _MAX_16), min(begin, _MAX_32)
        return rows + wide + _END.pack(0x06054B50, 0, 0, few, few, len(rows), low, 0)

    def _pickle(self) -> bytes:
        """Return `{"state_dict": {name: tensor}}` as torch pickles it, in protocol 2.

        Source: torch 2.13, serialization.py, `_save`, and Lib/pickle.py for the operations.
        """
        parts = [b"\x80\x02}", _text("state_dict"), b"}("]
        for number, target in enumerate(self.targets):
            storage = _STORAGES.get(target.dtype)
            if storage is None:
                raise CheckpointError(
                    f"tensor {one_line(target.name)} is {target.dtype}, which a .ckpt cannot hold; "
                    "write .safetensors"
                )
            count = _whole(_count(target.shape))
            parts += [
                _text(target.name),
                b"ctorch._utils\n_rebuild_tensor_v2\n((",
                *(_text("storage"), f"ctorch\n{storage}\n".encode(), _text(str(number))),
                *(_text("cpu"), count, b"tQK\x00"),
                *(_tuple(target.shape), _tuple(_strides(target.shape))),
                b"\x89ccollections\nOrderedDict\n)RtR",
            ]
        return b"".join([*parts, b"us."])


# Source: caffe2/serialize/versions.h of torch, kMinProducedFileFormatVersion.
_FORMAT_VERSION = b"3\n"


def _other_layout(shown: Path, fault: str) -> CheckpointError:
    return CheckpointError(
        f"{one_line(shown)} reads back with {fault}; check the disk, then convert again"
    )


def _literal(copier: Copier, entry: _Entry, data: bytes) -> int:
    import zlib

    checksum = zlib.crc32(data)
    copier.literal(entry.local_header(checksum))
    copier.literal(data)
    return checksum


def _text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def _whole(value: int) -> bytes:
    # The operation between the header and the stop.
    return pickle.dumps(value, protocol=2)[2:-1]


def _tuple(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_whole, values)) + b"t"


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= max(size, 1)
    return tuple(strides)


def format_of(suffix: str, targets: Sequence[Target], metadata: Mapping[str, str]) -> FileFormat:
    """Return the format of a file ending.

    Raises:
        CheckpointError: it is neither .safetensors nor .ckpt.
    """
    if suffix.lower() == ".safetensors":
        return SafetensorsFormat(targets, metadata)
    if suffix.lower() == ".ckpt":
        return CkptFormat(targets)
    raise CheckpointError(
        f"cannot write a file that ends in {suffix or 'nothing'!r}; end it in .safetensors or .ckpt"
    )
