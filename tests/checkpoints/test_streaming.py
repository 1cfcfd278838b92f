from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from colabtools.checkpoints import placing, streaming
from colabtools.drive import sha256_of
from colabtools.errors import CheckpointError, WorkspaceError


def every_dtype() -> dict[str, torch.Tensor]:
    """One small tensor of each dtype that the format knows, and every odd shape."""
    torch.manual_seed(0)
    tensors = {
        str(dtype): torch.randint(0, 2, (3, 5)).to(dtype)
        for dtype in streaming._DTYPES.values()  # noqa: SLF001 - the table itself is tested
    }
    tensors |= {
        "empty": torch.empty(0, 4),
        "not contiguous": torch.arange(12.0).reshape(3, 4).t(),
        "scalar": torch.tensor(0.1),
        "odd bits": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]),
        'ünï "quoted"': torch.ones(1),
    }
    return tensors


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and raw[0].equal(raw[1])


def test_what_is_written_comes_back_to_the_bit_here_and_in_the_library(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", every_dtype()
    digest = streaming.write_tensors(tensors, path)
    assert digest == streaming.FileDigest(path.stat().st_size, sha256_of(path))
    for found in (streaming.read_tensors(path, digest.sha256), load_file(path)):
        assert found.keys() == tensors.keys()
        assert [name for name in tensors if not same(found[name], tensors[name])] == []


def test_a_file_of_the_library_can_be_read(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", {"b": torch.rand(7), "a": torch.ones(2, 2).half()}
    save_file(tensors, path)
    found = streaming.read_tensors(path, sha256_of(path))
    assert all(same(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("tensors", [{}, {"a": torch.ones(3)}, every_dtype()])
def test_the_length_is_known_before_the_file_is_written(tmp_path: Path, tensors) -> None:
    expected = streaming.file_bytes({name: t.to("meta") for name, t in tensors.items()})
    assert streaming.write_tensors(tensors, tmp_path / "x").size_bytes == expected


def test_tensors_begin_aligned(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(1, dtype=torch.int64)}
    streaming.write_tensors(tensors, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert (length % 8, header["b"]["data_offsets"]) == (0, [0, 8])


def test_a_dtype_that_the_format_lacks_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor z is torch.complex128"):
        streaming.write_tensors({"z": torch.ones(1, dtype=torch.complex128)}, tmp_path / "x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "does not fit its length"),
        (lambda data: data + b"\0", "does not fit its length"),
        (lambda data: data[:5], "header cannot be read"),
        (lambda data: b"", "header cannot be read"),
        (lambda data: b"\xff" * 8 + data[8:], "header cannot be read"),
        (lambda data: data.replace(b"[3]", b"[9]"), "does not fit its length"),
        (lambda data: data.replace(b"[3]", b'["'), "header cannot be read"),
        (lambda data: data.replace(b"[0,12]", b"[0,99]"), "does not fit its length"),
        (lambda data: data.replace(b"F32", b"I32"), "not those that were saved"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "not those that were saved"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "x.safetensors"
    digest = streaming.write_tensors({"a": torch.ones(3)}, path)
    data = path.read_bytes()
    assert damage(data) != data
    path.write_bytes(damage(data))
    with pytest.raises(CheckpointError, match=rf"x\.safetensors is .*{message}"):
        streaming.read_tensors(path, digest.sha256)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone cannot be read"):
        streaming.read_tensors(tmp_path / "gone", "0" * 64)


def test_storage_that_changes_bytes_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupting_sync(descriptor: int) -> None:
        os.pwrite(descriptor, b"?", 1)

    monkeypatch.setattr(placing.os, "fsync", corrupting_sync)
    with pytest.raises(WorkspaceError, match="reads back other bytes than the 4 that were"):
        streaming.write_verified(tmp_path / "x", [b"ab", memoryview(b"cd")])


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failing_flush_is_not_swallowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(placing.os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        streaming.write_verified(tmp_path / "x", [b"ab"])
    assert caught.value.filename == str(tmp_path / "x")
    with pytest.raises(OSError, match=os.strerror(code)):
        streaming.sync_folder(tmp_path)


def test_a_file_system_without_flush_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(placing.os, "fsync", refuse)
    assert streaming.write_verified(tmp_path / "x", [b"ab"]).size_bytes == 2
    streaming.sync_folder(tmp_path)
