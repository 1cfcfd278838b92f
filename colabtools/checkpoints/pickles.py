"""Where the tensors of a .ckpt, .pt or .bin file lie, without unpickling it.

What torch saves is a pickle of names and shapes beside the plain bytes of the tensors. The pickle
is read by a machine that runs nothing, and refused if it holds anything but data.

Source: torch 2.13, torch/serialization.py: `_save` for archives, `_legacy_save` for older files.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from colabtools.checkpoints.archives import ZIP_START, read_archive
from colabtools.checkpoints.headers import (
    DTYPE_BYTES,
    Header,
    TensorEntry,
    describe_start,
    one_line,
    open_regular,
    read_safetensors_header,
)
from colabtools.checkpoints.unpickling import MAX_PICKLE_BYTES, Machine, StoredTensor
from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["ensure_safe", "read_torch_header"]

_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_COUNT_BYTES = 8

# Under which key trainers save a state dict, beside settings and the state of their optimizer.
_WRAPPERS = ("state_dict", "model", "module", "params_ema", "params")
_MAX_DEPTH = 12
# Of names, SDXL has 0.2 million letters, in 2,513 tensors.
_MAX_LETTERS = 4_000_000
_MAX_VALUES = 500_000
_MAX_TENSORS = 50_000
_MAX_NOTES = 64
_MAX_NOTE_LETTERS = 200


@dataclass(frozen=True)
class _Content:
    """What a file's pickle holds, and where the storages that it speaks of lie.

    Attributes:
        ranges: where each storage begins and ends, by its key.
    """

    path: Path
    value: Any
    ranges: Mapping[str, tuple[int, int]]
    size_bytes: int


def ensure_safe(path: Path) -> None:
    """Return if loading a weight file runs nothing: .safetensors, or a pickle of nothing but data.

    Raises:
        CheckpointError: it would call something, which is named; or it cannot be read.
    """
    if path.suffix.lower() == ".safetensors":
        read_safetensors_header(path)
    else:
        _read(path)


def read_torch_header(path: Path) -> Header:
    """Return which tensors a file of torch holds, and where; nothing of it is run or loaded.

    A state dict is found under the keys that trainers save it with; the names of others are those
    of the tables around a tensor, joined by dots. `metadata` has the texts and numbers beside it.

    Raises:
        CheckpointError: its pickle holds more than data, a tensor is not kept as a plain range of
            bytes, or the file is damaged, cut off or of another kind.
    """
    content = _read(path)
    state = _state(content.value)
    entries: dict[str, TensorEntry] = {}
    for name, tensor in _tensors(state, path):
        if len(entries) == _MAX_TENSORS:
            raise _unusable(path, f"it has more than {_MAX_TENSORS} tensors")
        if name in entries:
            raise _unusable(path, f"it has two tensors of the name {one_line(name)}")
        entries[name] = _entry(name, tensor, content)
    if not entries:
        raise _unusable(path, "it holds no tensors")
    ordered = sorted(entries.values(), key=lambda entry: (entry.begin, entry.end))
    tensors = {entry.name: entry for entry in ordered}
    return Header(path, tensors, _notes(content.value), content.size_bytes)


def _unusable(path: Path, fault: str) -> CheckpointError:
    return CheckpointError(
        f"{one_line(path)} cannot be used: {fault}; get the model as .safetensors"
    )


def _read(path: Path) -> _Content:
    with open_regular(path) as file:
        try:
            start = file.read(64)
            if start.startswith(ZIP_START):
                return _read_archive(file, path)
            if start.startswith(b"\x80"):
                return _read_legacy(file, path)
        except OSError as error:
            raise CheckpointError(f"cannot read {one_line(path)}: {error}; try again") from error
    if not start:
        raise CheckpointError(f"{one_line(path)} is empty; download or save it again")
    foreign = describe_start(start) or "it begins neither as an archive nor as a pickle"
    if start[8:9] == b"{":
        foreign = "it is a .safetensors file, so its name should end so"
    elif start[:1] in b"(}]cI":
        # The text form of pickles. No weights are kept in it, and what it calls is worth naming.
        Machine(path, start + b"\n").load()
    raise CheckpointError(f"{one_line(path)} is no file of torch: {foreign}")


def _read_archive(file: BinaryIO, path: Path) -> _Content:
    files = read_archive(file, path)
    if "data.pkl" not in files:
        raise _unusable(path, "its archive has no data.pkl")
    if "byteorder" in files:
        order = files["byteorder"]
        if os.pread(file.fileno(), min(order.end - order.begin, 16), order.begin) != b"little":
            raise _unusable(path, "its numbers are not little-endian")
    place = files["data.pkl"]
    size_bytes = min(place.end - place.begin, MAX_PICKLE_BYTES)
    data = os.pread(file.fileno(), size_bytes, place.begin)
    machine = Machine(path, data, cut=place.end - place.begin > size_bytes)
    value = machine.load()
    if place.begin + machine.at != place.end:
        raise _unusable(path, "bytes follow its pickle")
    ranges = {
        name.removeprefix("data/"): (stored.begin, stored.end)
        for name, stored in files.items()
        if name.startswith("data/")
    }
    return _Content(path, value, ranges, os.fstat(file.fileno()).st_size)


def _read_legacy(file: BinaryIO, path: Path) -> _Content:
    """Return the content of a file as torch wrote it before 1.6: five pickles, then storages."""
    size_bytes = os.fstat(file.fileno()).st_size
    data = os.pread(file.fileno(), min(size_bytes, MAX_PICKLE_BYTES), 0)
    machine = Machine(path, data, cut=size_bytes > len(data))
    if machine.load() != _MAGIC:
        raise _unusable(path, "it is a pickle, and none that torch writes")
    protocol, system, value, keys = (machine.load() for _ in range(4))
    if protocol != _LEGACY_PROTOCOL or type(system) is not dict or type(keys) is not list:
        raise _unusable(path, "it is a pickle, and none that torch writes")
    if system.get("little_endian") is not True:
        raise _unusable(path, "its numbers are not little-endian")
    storages = machine.storages
    ranges: dict[str, tuple[int, int]] = {}
    at = machine.at
    for key in keys:
        storage = storages.get(key) if type(key) is str else None
        count = int.from_bytes(os.pread(file.fileno(), _COUNT_BYTES, at), "little")
        if storage is None or key in ranges or count != storage.count:
            raise _unusable(path, f"its storage {one_line(key)} is not as its pickle says")
        begin = at + _COUNT_BYTES
        at = begin + count * DTYPE_BYTES[storage.dtype]
        ranges[key] = (begin, at)
    if at > size_bytes:
        raise CheckpointError(
            f"{one_line(path)} is cut off: it has {size_bytes} of {at} bytes; download it again"
        )
    if at < size_bytes:
        raise _unusable(path, f"{size_bytes - at} bytes follow its last tensor")
    return _Content(path, value, ranges, size_bytes)


def _state(value: Any) -> Any:
    """Return the state dict inside of what a trainer saved."""
    for _ in range(_MAX_DEPTH):
        if type(value) is not dict:
            break
        holds = any(type(each) is StoredTensor for each in value.values())
        # A loose tensor, such as a score, may stand beside a state dict that is named as one.
        names = _WRAPPERS[:1] if holds else _WRAPPERS
        inner = next((value[name] for name in names if _has_tensors(value.get(name))), None)
        if inner is None:
            break
        value = inner
    return value


def _has_tensors(value: object) -> bool:
    return type(value) is dict and any(
        type(each) is StoredTensor or type(each) is dict for each in value.values()
    )


def _tensors(value: object, path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Yield each tensor inside of tables and lists with its name, in the order of the pickle."""
    waiting: list[tuple[str, object, int]] = [("", value, 0)]
    # What is small in a pickle can be said in it many times over, or inside of itself.
    values = letters = 0
    while waiting:
        name, each, depth = waiting.pop()
        if type(each) is StoredTensor:
            yield name or "tensor", each
            continue
        inside = each if type(each) is dict else _sequence(each)
        values += len(inside)
        if depth == _MAX_DEPTH or values > _MAX_VALUES:
            raise _unusable(path, "it holds more than the tensors of a model")
        rows = inside.items() if isinstance(inside, dict) else enumerate(inside)
        inner = [(_key(key), item, depth + 1) for key, item in rows if _is_of_interest(item)]
        letters += sum(len(name) + len(key) + 1 for key, _, _ in inner)
        if letters > _MAX_LETTERS:
            raise _unusable(path, "it holds more than the tensors of a model")
        prefix = f"{name}." if name else ""
        waiting += [(f"{prefix}{key}", item, deep) for key, item, deep in reversed(inner)]


def _sequence(found: object) -> list[Any] | tuple[Any, ...]:
    return found if isinstance(found, (list, tuple)) else ()


def _is_of_interest(item: object) -> bool:
    return type(item) is StoredTensor or (type(item) in (dict, list, tuple) and bool(item))


def _key(key: object) -> str:
    return str(key) if type(key) in (str, int) else "?"


def _entry(name: str, tensor: StoredTensor, content: _Content) -> TensorEntry:
    shown, path = one_line(name), content.path
    if tensor.storage.key not in content.ranges:
        raise _unusable(path, f"the bytes of its tensor {shown} are missing")
    begin, end = content.ranges[tensor.storage.key]
    if tensor.storage.count * DTYPE_BYTES[tensor.storage.dtype] > end - begin:
        raise _unusable(path, f"the bytes of its tensor {shown} are not all there")
    size = DTYPE_BYTES[tensor.dtype]
    count = math.prod(tensor.shape)
    if count and not _is_contiguous(tensor):
        raise CheckpointError(
            f"{one_line(path)} cannot be used: its tensor {shown} does not lie in one piece; "
            "save it again after .contiguous()"
        )
    first = begin + tensor.offset * size if count else begin
    if first + count * size > end:
        raise _unusable(path, f"its tensor {shown} reaches past its bytes")
    return TensorEntry(name, tensor.dtype, tensor.shape, path, first, first + count * size)


def _is_contiguous(tensor: StoredTensor) -> bool:
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _notes(value: object) -> dict[str, str]:
    """Return the texts and numbers that stand beside a state dict."""
    if type(value) is not dict:
        return {}
    notes = (item for item in value.items() if type(item[0]) is str and _is_note(item[1]))
    few = itertools.islice(notes, _MAX_NOTES)
    return {key: str(note)[:_MAX_NOTE_LETTERS] for key, note in few}


def _is_note(note: object) -> bool:
    if type(note) is int:
        return abs(note) < 2**63
    return type(note) in (str, float, bool)
