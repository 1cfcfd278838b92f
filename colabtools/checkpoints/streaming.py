"""Weight files written and read one tensor at a time, hashed on the way.

The safetensors library wants all tensors in memory twice to write them, or reads a file once more
to know its digest; a training state can be most of a machine's memory and tens of gigabytes long.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from colabtools.checkpoints.placing import sync, sync_folder
from colabtools.drive import sha256_of
from colabtools.errors import CheckpointError, WorkspaceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

__all__ = [
    "FileDigest",
    "file_bytes",
    "read_tensors",
    "sync_folder",
    "write_tensors",
    "write_verified",
]

# Source: safetensors 0.8, README "Format", and `MAX_HEADER_SIZE` of its tensor.rs.
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
_ALIGNMENT_BYTES = 8
_DTYPES = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "U8": torch.uint8,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class FileDigest:
    """What a file must be: its length and its SHA-256 in hex."""

    size_bytes: int
    sha256: str


def write_verified(path: Path, chunks: Iterable[bytes | memoryview]) -> FileDigest:
    """Write a file, flush it to the disk and read it back; return the digest of what was meant.

    The name is taken at once: for files of a folder that gets its own name last.

    Raises:
        OSError: the storage failed.
        WorkspaceError: the storage gave back other bytes than it was given.
    """
    digest, size_bytes = hashlib.sha256(), 0
    try:
        with path.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size_bytes += memoryview(chunk).nbytes
            file.flush()
            sync(file.fileno())
    except OSError as error:
        # A write that fails knows its file by number only.
        error.filename = error.filename or str(path)
        raise
    meant = FileDigest(size_bytes, digest.hexdigest())
    if FileDigest(path.stat().st_size, sha256_of(path)) != meant:
        raise WorkspaceError(
            f"{path} reads back other bytes than the {size_bytes} that were written; "
            "check the disk, or use another one"
        )
    return meant


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> FileDigest:
    """Write a .safetensors file as `write_verified` does; tensors may be on any device.

    Raises:
        CheckpointError: the format has no name for a tensor's dtype.
        OSError: the storage failed.
        WorkspaceError: the storage gave back other bytes than it was given.
    """

    def chunks() -> Iterator[bytes | memoryview]:
        yield _header(tensors)
        for name in _in_order(tensors):
            yield _bytes_of(tensors[name].detach().cpu().contiguous())

    return write_verified(path, chunks())


def file_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the length of the file that `write_tensors` would make; meta tensors will do.

    Raises:
        CheckpointError: the format has no name for a tensor's dtype.
    """
    return len(_header(tensors)) + sum(t.numel() * t.element_size() for t in tensors.values())


def read_tensors(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a .safetensors file, on the CPU, hashed while they are read.

    Raises:
        CheckpointError: the file is missing, cut off, malformed or not the one of this digest.
    """
    digest = hashlib.sha256()
    tensors = {}
    try:
        with path.open("rb") as file:
            for name, dtype, shape in _read_header(file, digest, path):
                tensor = torch.empty(shape, dtype=dtype)
                view = _bytes_of(tensor)
                if file.readinto(view) != view.nbytes:
                    raise CheckpointError(f"{path} is cut off in tensor {name}")
                digest.update(view)
                tensors[name] = tensor
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    if digest.hexdigest() != sha256:
        raise CheckpointError(f"{path} is damaged: its bytes are not those that were saved")
    return tensors


def _in_order(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    # Wide elements first keeps every tensor aligned, so that other readers can map the file.
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    rows: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in _in_order(tensors):
        tensor = tensors[name]
        if tensor.dtype not in _DTYPE_NAMES:
            raise CheckpointError(f"tensor {name} is {tensor.dtype}, which no weight file can hold")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        rows[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _read_header(
    file: BinaryIO, digest: Any, path: Path
) -> list[tuple[str, torch.dtype, list[int]]]:
    """Return name, dtype and shape of each tensor, in the order in which their bytes follow."""
    length = file.read(_LENGTH_BYTES)
    size = int.from_bytes(length, "little")
    text = file.read(min(size, _MAX_HEADER_BYTES))
    digest.update(length + text)
    try:
        rows = json.loads(text)
        rows.pop("__metadata__", None)
        ordered = sorted(rows.items(), key=lambda row: row[1]["data_offsets"])
        found = [(name, _DTYPES[row["dtype"]], row["shape"]) for name, row in ordered]
        ends = [row["data_offsets"][1] for _, row in ordered]
        lengths = [math.prod(shape) * dtype.itemsize for _, dtype, shape in found]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged: its header cannot be read") from error
    # Checked before memory is asked for: a changed shape could ask for all there is.
    whole = path.stat().st_size == _LENGTH_BYTES + size + sum(lengths)
    if not whole or ends != list(itertools.accumulate(lengths)):
        raise CheckpointError(f"{path} is damaged: its header does not fit its length")
    return found


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view
