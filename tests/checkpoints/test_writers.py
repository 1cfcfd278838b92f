"""The .ckpt that the web UIs' unpicklers admit, and chunks of another precision."""

from __future__ import annotations

import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from colabtools.checkpoints import casting, writers
from colabtools.checkpoints.casting import cast_bytes, identity_bytes, transposed_bytes
from colabtools.checkpoints.output import write_file
from colabtools.checkpoints.plan import plan_plain
from colabtools.checkpoints.sources import live_tensors
from colabtools.checkpoints.writers import CkptFormat, format_of
from colabtools.errors import CheckpointError

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
Tensors = dict[str, torch.Tensor]


def make_tensors(dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    shapes = {"a.weight": (3, 5, 1, 1), "a.bias": (7,), "b": (), "ü.none": (0, 4), "c": (1000, 30)}
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


def save(tensors: Tensors, path: Path) -> Path:
    return write_file(path, plan_plain(live_tensors(tensors)), {}).path


def same(left: Tensors, right: Tensors) -> bool:
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype and left[name].equal(right[name]) for name in left
    )


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool, torch.float64])
def test_torch_reads_a_ckpt_safely_whether_mapped_or_not(
    tmp_path: Path, dtype: torch.dtype, mmap: bool
) -> None:
    tensors = make_tensors(dtype)
    path = save(tensors, tmp_path / "x.ckpt")
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert list(loaded) == ["state_dict"]
    assert same(loaded["state_dict"], tensors)
    strides = {name: tensor.stride() for name, tensor in loaded["state_dict"].items()}
    assert strides == {name: tensor.stride() for name, tensor in tensors.items()}


def test_the_archive_of_a_ckpt_holds_what_web_uis_admit_and_nothing_else(tmp_path: Path) -> None:
    """A1111 1.10.1, modules/safe.py: its pattern for the names, its list of classes."""
    path = save(make_tensors(torch.float16), tmp_path / "x.ckpt")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.namelist() == [
            "archive/data.pkl", *(f"archive/data/{n}" for n in range(5)), "archive/version",
        ]  # fmt: skip
        assert archive.read("archive/version") == b"3\n"
        operations = list(pickletools.genops(archive.read("archive/data.pkl")))
    classes = {argument for code, argument, _ in operations if code.name == "GLOBAL"}
    assert classes == {
        *("collections OrderedDict", "torch HalfStorage", "torch._utils _rebuild_tensor_v2"),
    }
    assert {code.proto for code, _, _ in operations} <= {0, 1, 2}


def test_the_archive_reads_as_the_one_that_torch_would_write(tmp_path: Path) -> None:
    tensors = make_tensors(torch.bfloat16)
    torch.save({"state_dict": tensors}, tmp_path / "torch.ckpt")
    with zipfile.ZipFile(tmp_path / "torch.ckpt") as theirs:
        names = {name.partition("/")[2]: name for name in theirs.namelist()}
        with zipfile.ZipFile(save(tensors, tmp_path / "ours.ckpt")) as ours:
            for entry in ours.namelist():
                if "/data/" in entry or entry.endswith("version"):
                    name = names[entry.removeprefix("archive/")]
                    assert ours.read(entry) == theirs.read(name)


def test_every_tensor_of_a_ckpt_begins_at_a_multiple_of_64_bytes(tmp_path: Path) -> None:
    path = save(make_tensors(torch.float16), tmp_path / "x.ckpt")
    loaded = torch.load(path, weights_only=True, mmap=True)["state_dict"]
    assert {tensor.data_ptr() % 64 for tensor in loaded.values()} == {0}


def test_a_dtype_that_a_ckpt_has_no_name_for_is_refused(tmp_path: Path) -> None:
    tensors = {"q": torch.zeros(3, dtype=torch.float8_e4m3fn)}
    with pytest.raises(CheckpointError, match="q is F8_E4M3, which a .ckpt cannot hold"):
        save(tensors, tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_an_ending_of_no_format_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"ends in '\.bin'; end it in \.safetensors"):
        format_of(".bin", [], {})


@pytest.mark.heavy
def test_an_archive_past_four_gigabytes_is_read_by_all(tmp_path: Path) -> None:
    """One tensor of 4.3 GB and one behind it: both the length and the offset need 64 bits."""
    big = torch.zeros(4_300_000_000, dtype=torch.uint8)
    big[-1] = 7
    path = save({"big": big, "last": torch.arange(5)}, tmp_path / "x.ckpt")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.getinfo("archive/data/0").file_size == 4_300_000_000
    loaded = torch.load(path, weights_only=True, mmap=True)["state_dict"]
    assert (loaded["big"][-1], loaded["last"].tolist()) == (7, [0, 1, 2, 3, 4])


def test_the_central_directory_has_64_bit_fields_only_where_they_are_needed() -> None:
    small = writers._Entry(b"archive/data/0", 64, 128, 100)
    large = writers._Entry(b"archive/data/1", 2**32 + 64, 2**32 + 192, 2**32)
    assert len(small.central_header(0)) == 46 + 14
    assert len(large.central_header(0)) == 46 + 14 + 4 + 3 * 8
    assert small.local_header(0)[-16:] == b"Z" * 16
    assert (len(small.local_header(0)), len(large.local_header(0))) == (64, 128)


@pytest.mark.parametrize("damage", ["truncated", "another entry"])
def test_an_archive_that_does_not_reopen_is_refused(tmp_path: Path, damage: str) -> None:
    tensors = make_tensors()
    path = save(tensors, tmp_path / "x.ckpt")
    meant = CkptFormat(plan_plain(live_tensors(tensors)))
    meant.reopen(path, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    else:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("archive/byteorder", "little")
    with pytest.raises(CheckpointError, match="x.ckpt reads back with"):
        meant.reopen(path, path)


CASTS = [("F32", "F16"), ("F32", "BF16"), ("BF16", "F16"), ("F16", "BF16"), ("BF16", "F32"),
         ("F16", "F32"), ("F64", "F16"), ("F64", "BF16")]  # fmt: skip
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
NUMPY_CHILD = """
import sys
from colabtools.checkpoints.casting import cast_bytes
data = sys.stdin.buffer.read()
cast = cast_bytes(memoryview(data), sys.argv[1], sys.argv[2], "t")
assert "torch" not in sys.modules
sys.stdout.buffer.write(cast)
"""


@pytest.mark.parametrize(("source", "target"), CASTS)
def test_numpy_and_torch_round_alike(source: str, target: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([
        torch.randn(20_000, generator=generator) * 10.0 ** torch.randint(-9, 4, (20_000,),
                                                                          generator=generator),
        torch.tensor([0.0, -0.0, 65504.0, 6e-8, 2.98e-8, 1.00048828125, 1.0078125 / 2]),
    ])  # fmt: skip
    data = values.clamp(-60000, 60000).to(TORCH[source]).view(torch.uint8).numpy().tobytes()
    meant = torch.frombuffer(bytearray(data), dtype=TORCH[source])
    if source == "F64":
        # By way of fp32, as the last step rounds in either case.
        meant = meant.float() if target == "BF16" else meant
    cast = meant.to(TORCH[target]).view(torch.uint8).numpy().tobytes()
    assert cast_bytes(memoryview(bytearray(data)), source, target, "t").tobytes() == cast
    child = subprocess.run(
        [sys.executable, "-c", NUMPY_CHILD, source, target], input=data, stdout=subprocess.PIPE,
        check=True,
    )  # fmt: skip
    assert child.stdout == cast


@pytest.mark.parametrize("value", [70000.0, float("inf"), float("-inf"), float("nan")])
def test_numbers_that_do_not_fit_are_found_without_torch_as_well(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.array([1.0, value], np.float32).view(np.uint8).data
    bf16 = value == 70000.0
    for _ in range(2):
        with pytest.raises(CheckpointError, match="t has values that are not finite in fp16"):
            cast_bytes(data, "F32", "F16", "t")
        if bf16:
            assert len(cast_bytes(data, "F32", "BF16", "t")) == 4
        else:
            with pytest.raises(CheckpointError, match="not finite in bf16"):
                cast_bytes(data, "F32", "BF16", "t")
        monkeypatch.delitem(sys.modules, "torch", raising=False)
    largest = np.array([3.4e38], np.float32).view(np.uint8).data
    with pytest.raises(CheckpointError, match="not finite in bf16"):
        cast_bytes(largest, "F32", "BF16", "t")


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_matrices_are_turned_and_made(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(casting, "_CHUNK_ITEMS", 7)
    matrix = torch.arange(12.0).reshape(3, 4).to(TORCH[dtype])
    data = memoryview(matrix.view(torch.uint8).numpy().tobytes())
    turned = b"".join(transposed_bytes(data, dtype, (3, 4)))
    assert turned == matrix.t().contiguous().view(torch.uint8).numpy().tobytes()
    eye = torch.eye(5, dtype=TORCH[dtype]).view(torch.uint8).numpy().tobytes()
    assert identity_bytes(5, dtype).tobytes() == eye
