"""Headers of .safetensors files: read as the library writes them, and refused when they lie."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from colabtools.checkpoints.headers import (
    DTYPE_BYTES,
    encode_safetensors_header,
    read_safetensors_header,
)
from colabtools.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


def file_of(path: Path, rows: Any, data: bytes = b"") -> Path:
    text = rows if isinstance(rows, bytes) else json.dumps(rows).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def row(begin: int, end: int, shape: list[int], dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"b": np.arange(6, dtype=np.float16).reshape(2, 3), "a": np.zeros((), np.int64)}
    save_file(tensors, path, {"format": "pt"})
    header = read_safetensors_header(path)
    assert header.metadata == {"format": "pt"}
    assert (header.size_bytes, header.truncated_bytes) == (path.stat().st_size, 0)
    assert {n: (e.dtype, e.shape) for n, e in header.tensors.items()} == {
        "a": ("I64", ()),
        "b": ("F16", (2, 3)),
    }
    for name, entry in header.tensors.items():
        assert path.read_bytes()[entry.begin : entry.end] == tensors[name].tobytes()


def test_the_library_reads_what_is_encoded(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    head = encode_safetensors_header([("x\n'", "F32", (2,)), ("e", "F16", (0,))], {"k": "v"})
    path.write_bytes(head + np.array([1, 2], np.float32).tobytes())
    assert len(head) % 8 == 0
    assert load_file(path)["x\n'"].tolist() == [1, 2]
    assert load_file(path)["e"].shape == (0,)
    assert read_safetensors_header(path).metadata == {"k": "v"}


def test_a_file_that_lacks_its_end_is_refused_or_described(tmp_path: Path) -> None:
    path = file_of(tmp_path / "a.safetensors", {"a": row(0, 9, [9])}, b"1234")
    with pytest.raises(CheckpointError, match="cut off"):
        read_safetensors_header(path)
    assert read_safetensors_header(path, allow_truncated=True).truncated_bytes == 5


LIES: dict[str, tuple[Any, bytes, str]] = {
    "bool for a size": ({"a": row(0, 1, [True])}, b"1", "shape"),
    "deep nesting": (b'{"a":' + b"[" * 200_000, b"", "cannot be read"),
    "gap": ({"a": row(0, 1, [1]), "b": row(2, 3, [1])}, b"123", "hole"),
    "huge product": ({"a": row(0, 0, [2**62, 2**62, 0, 5])}, b"x", "follow its last"),
    "items without end": (b"{" + b'"a":[' + b"1," * 1_000_001, b"", "more than"),
    "list": (b"[]", b"", "no JSON object"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "name twice": (b'{"a":1,"a":1}', b"", "twice"),
    "negative offsets": ({"a": row(-1, 0, [1])}, b"", "offsets"),
    "not UTF-8": (b'{"\xff":1}', b"", "cannot be read"),
    "overlap": ({"a": row(0, 2, [2]), "b": row(1, 3, [2])}, b"123", "overlaps"),
    "row of a number": ({"a": 3}, b"", "not described"),
    "size of 2**63": ({"a": row(0, 1, [2**63])}, b"1", "shape"),
    "strange dtype": ({"a": row(0, 1, [1], "Q7")}, b"1", "of type Q7"),
    "trailing bytes": ({"a": row(0, 1, [1])}, b"12", "follow its last"),
    "wrong length": ({"a": row(0, 3, [4])}, b"123", "3 bytes of U8"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_in_one_line(tmp_path: Path, lie: str) -> None:
    rows, data, reason = LIES[lie]
    path = file_of(tmp_path / "a.safetensors", rows, data)
    with pytest.raises(CheckpointError, match=reason) as refusal:
        read_safetensors_header(path)
    assert str(refusal.value).isprintable()


STARTS = {
    "empty": (b"", "is empty"),
    "five bytes": (b"\x01\x02\x03\x04\x05", "cut off in its header"),
    "header of 2**63": ((2**63).to_bytes(8, "little") + b"{}", "9223372036854775808"),
    "header past the end": ((99).to_bytes(8, "little") + b"{}", "cut off in its header"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "git lfs pull"),
    "pickle": (b"\x80\x02}q\x00.", "bare pickle"),
    "web page": (b"\n<!DOCTYPE html><html>", "web page"),
    "zip": (b"PK\x03\x04" + b"\0" * 60, "zip archive"),
}


@pytest.mark.parametrize("start", STARTS)
def test_a_file_of_another_kind_is_named(tmp_path: Path, start: str) -> None:
    data, reason = STARTS[start]
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=reason):
        read_safetensors_header(path)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    for path, reason in (
        (pipe, "no regular file"),
        (tmp_path, "no regular file"),
        (tmp_path / "none", "No such file"),
        (tmp_path / "a\0b", "null"),
        (tmp_path / "line\nbreak", r"line\\nbreak"),
    ):
        with pytest.raises(CheckpointError, match=reason) as refusal:
            read_safetensors_header(path)
        assert str(refusal.value).isprintable()


def test_every_width_is_the_one_of_torch() -> None:
    from colabtools.checkpoints.streaming import _DTYPES

    assert all(dtype.itemsize == DTYPE_BYTES[name] for name, dtype in _DTYPES.items())
