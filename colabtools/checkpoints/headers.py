"""What a .safetensors file holds, from its header alone, with the standard library alone.

Every number of a header is checked against the file before it is used: a header is the first thing
that a broken or hostile download gets to say.

Source: safetensors 0.8, README "Format" and the checks of `Metadata::validate` in its tensor.rs.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "DTYPE_BYTES",
    "PAGE_BYTES",
    "Header",
    "TensorEntry",
    "describe_start",
    "encode_safetensors_header",
    "one_line",
    "open_regular",
    "read_safetensors_header",
]

DTYPE_BYTES: Mapping[str, int] = {
    "BF16": 2,
    "BOOL": 1,
    "C64": 8,
    "F16": 2,
    "F32": 4,
    "F64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "I32": 4,
    "I64": 8,
    "I8": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
    "U8": 1,
}

# Of memory, and the blocks of most file systems.
PAGE_BYTES = 4096

_LENGTH_BYTES = 8
_ALIGNMENT_BYTES = 8
# The format allows 100 MB. Of the models that are converted here the longest header has 0.3 MB, and
# training notes of adapters reach a few MB; a header of 100 MB would take a gigabyte of memory.
_MAX_HEADER_BYTES = 8 * 1024**2
# Each of these characters makes an object in memory when the header is read.
_MAX_HEADER_ITEMS = 1_000_000
_MAX_RANK = 32
_SHOWN_CHARACTERS = 200
_BINARY = getattr(os, "O_BINARY", 0)

# How files begin that often lie under the name of weights.
_FOREIGN_STARTS = {
    b"<": "it is a web page, so the download needs another address or a log-in",
    b"PK\x03\x04": "it is a zip archive, so its name should end in .ckpt or .pt",
    b"Rar!": "it is a RAR archive: unpack it first",
    b"7z\xbc\xaf": "it is a 7-Zip archive: unpack it first",
    b"\x1f\x8b": "it is gzip-compressed: unpack it first",
    b"\x80": "it is a bare pickle, so its name should end in .ckpt or .pt",
    b"GGUF": "it is a GGUF file, which is quantized and not read here",
    b"version https://git-lfs": "it is a Git LFS pointer of a few lines: run git lfs pull",
    b"{": "it is a JSON text: give the file that it speaks of",
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor's bytes are: `path`, from `begin` up to `end`, row-major, little-endian.

    Attributes:
        dtype: the code that safetensors has for it, such as "F16".
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Length of the tensor's bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """What a weight file says it holds; tensors are in the order of their bytes.

    Attributes:
        size_bytes: length of the file as it is.
        truncated_bytes: how many bytes the file lacks of what its header promises.
    """

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] = field(default_factory=dict)
    size_bytes: int = 0
    truncated_bytes: int = 0


def one_line(text: object) -> str:
    """Return a path or a name as it can stand in a message: one line, not too long."""
    shown = str(text)
    if len(shown) > _SHOWN_CHARACTERS:
        shown = f"{shown[:_SHOWN_CHARACTERS]}..."
    return shown if shown.isprintable() else repr(shown)


def describe_start(start: bytes) -> str:
    """Return what a file is that begins like this and is no weights, or an empty text."""
    trimmed = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    return next((text for sign, text in _FOREIGN_STARTS.items() if trimmed.startswith(sign)), "")


def open_regular(path: Path) -> BinaryIO:
    """Return the file, open for reading; never waits, as opening a named pipe would.

    Raises:
        CheckpointError: there is no such file, it cannot be read, or it is a folder or a device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
        try:
            regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        except OSError:
            os.close(descriptor)
            raise
        if regular:
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot read {one_line(path)}: {reason}; check the path") from error
    raise CheckpointError(f"{one_line(path)} is no regular file; give a file with weights")


def read_safetensors_header(path: Path, *, allow_truncated: bool = False) -> Header:
    """Return what the header of a .safetensors file says, once all of it was found to hold.

    Args:
        path: the file.
        allow_truncated: whether a file that lacks its end is described rather than refused.

    Raises:
        CheckpointError: the file cannot be read, or is damaged, cut off or of another kind.
    """
    with open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        try:
            text = _read_text(file, size_bytes, path)
        except OSError as error:
            raise CheckpointError(f"cannot read {one_line(path)}: {error}; try again") from error
    rows = _parse(text, path)
    metadata = _metadata(rows.pop("__metadata__", {}), path)
    data_begin = _LENGTH_BYTES + len(text)
    entries = [_entry(name, row, path, data_begin) for name, row in rows.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    end = _gapless_end(entries, data_begin, path)
    if size_bytes > end:
        raise _damaged(path, f"{size_bytes - end} bytes follow its last tensor")
    if size_bytes < end and not allow_truncated:
        raise CheckpointError(
            f"{one_line(path)} is cut off: it has {size_bytes} of {end} bytes; download it again"
        )
    tensors = {entry.name: entry for entry in entries}
    return Header(path, tensors, metadata, size_bytes, end - size_bytes)


def _damaged(path: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"{one_line(path)} is damaged: {fault}; download or save it again")


def _read_text(file: BinaryIO, size_bytes: int, path: Path) -> bytes:
    start = file.read(_LENGTH_BYTES)
    length = int.from_bytes(start, "little")
    foreign = describe_start(start + file.read(24))
    # Where the letters that another format begins with are read as a length, it is out of reach.
    if foreign and (len(start) < _LENGTH_BYTES or length > _MAX_HEADER_BYTES):
        raise CheckpointError(f"{one_line(path)} is no .safetensors file: {foreign}")
    if size_bytes == 0:
        raise CheckpointError(f"{one_line(path)} is empty; download or save it again")
    if len(start) == _LENGTH_BYTES and length > _MAX_HEADER_BYTES:
        raise _damaged(path, f"its header would have {length} bytes, of {_MAX_HEADER_BYTES}")
    if len(start) < _LENGTH_BYTES or length > size_bytes - _LENGTH_BYTES:
        # Without a whole header not even a truncated file can be described.
        raise CheckpointError(
            f"{one_line(path)} is cut off in its header: it has {size_bytes} bytes; "
            "download it again"
        )
    file.seek(_LENGTH_BYTES)
    text = file.read(length)
    if len(text) != length or not text.startswith(b"{"):
        raise _damaged(path, "its header is no JSON object")
    return text


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    if sum(map(text.count, (b"[", b"{", b","))) > _MAX_HEADER_ITEMS:
        raise _damaged(path, f"its header has more than {_MAX_HEADER_ITEMS} items")
    try:
        rows = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise _damaged(path, f"its header cannot be read ({reason})") from error
    if not isinstance(rows, dict):
        raise _damaged(path, "its header is no JSON object")
    return rows


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{one_line(twice)} stands there twice")
    return found


def _metadata(found: object, path: Path) -> dict[str, str]:
    if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
        return found
    raise _damaged(path, "its __metadata__ is no table of texts")


def _entry(name: str, row: object, path: Path, data_begin: int) -> TensorEntry:
    shown = one_line(name)
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor {shown} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{one_line(path)} cannot be used: tensor {shown} is of type {one_line(dtype)}; "
            "get the file in fp16, bf16 or fp32"
        )
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise _damaged(path, f"tensor {shown} has shape {one_line(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {shown} has the offsets {one_line(offsets)}")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise _damaged(
            path, f"tensor {shown} of shape {one_line(shape)} has {end - begin} bytes of {dtype}"
        )
    return TensorEntry(name, dtype, tuple(shape), path, data_begin + begin, data_begin + end)


def _are_sizes(found: object) -> bool:
    whole = isinstance(found, list) and all(type(item) is int for item in found)
    return whole and all(0 <= item < 2**63 for item in found)  # type: ignore[attr-defined]


def _gapless_end(entries: Iterable[TensorEntry], begin: int, path: Path) -> int:
    """Return where the last tensor ends; refuse holes and bytes that two tensors share."""
    end = begin
    for entry in entries:
        if entry.begin != end:
            fault = "overlaps another tensor" if entry.begin < end else "follows a hole"
            raise _damaged(path, f"tensor {one_line(entry.name)} {fault}")
        end = entry.end
    return end


def encode_safetensors_header(
    rows: Iterable[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    *,
    place: int | None = None,
) -> bytes:
    """Return the header, its length before it, of tensors that follow in this order.

    Args:
        rows: name, dtype and shape of each tensor.
        metadata: texts by name; may be empty.
        place: where in a page of memory the first tensor is to begin, a multiple of 8; None is
            wherever the header happens to end.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in rows:
        begin, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    if place is not None:
        text += b" " * ((place - _LENGTH_BYTES - len(text)) % PAGE_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
