"""One file, written whole or not at all, and only with what the web UIs' unpicklers admit."""

from __future__ import annotations

import errno
import pickletools
import resource
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from colabtools.checkpoints import single_file
from colabtools.checkpoints.single_file import WrittenFile, save_ckpt, save_safetensors
from colabtools.drive import sha256_of
from colabtools.errors import CheckpointError, WorkspaceError

SAVERS = {"model.ckpt": save_ckpt, "model.safetensors": save_safetensors}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
Saver = Callable[..., WrittenFile]
each_saver = pytest.mark.parametrize(("name", "save"), SAVERS.items())


def make_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"a.weight": (3, 5, 1, 1), "a.bias": (7,), "b": (), "ü.none": (0, 4), "c": (1000, 30)}
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


def read(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".ckpt":
        return dict(torch.load(path, weights_only=True)["state_dict"])
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and left[name].equal(right[name]) for name in left
    )


@each_saver
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read_back_and_told(
    tmp_path: Path, name: str, save: Saver, dtype: torch.dtype
) -> None:
    tensors = make_tensors(dtype)
    file = save(tensors, tmp_path / name)
    assert same(read(tmp_path / name), tensors)
    assert file.path == tmp_path / name
    assert file.size_bytes == (tmp_path / name).stat().st_size
    assert file.sha256 == sha256_of(tmp_path / name)
    assert file.tensor_count == 5
    assert list(tmp_path.iterdir()) == [file.path]


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_reads_a_ckpt_safely_whether_mapped_or_not(
    tmp_path: Path, dtype: torch.dtype, mmap: bool
) -> None:
    tensors = make_tensors(dtype)
    save_ckpt(tensors, tmp_path / "x.ckpt")
    loaded = torch.load(tmp_path / "x.ckpt", weights_only=True, mmap=mmap)
    assert list(loaded) == ["state_dict"]
    assert list(loaded["state_dict"]) == list(tensors)
    assert same(loaded["state_dict"], tensors)
    strides = {name: tensor.stride() for name, tensor in loaded["state_dict"].items()}
    assert strides == {name: tensor.stride() for name, tensor in tensors.items()}


def test_a_view_is_written_as_what_it_shows(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"turned": whole.t(), "part": whole[1:, 1:], "again": whole}
    save_ckpt(tensors, tmp_path / "x.ckpt")
    assert same(read(tmp_path / "x.ckpt"), tensors)


def test_the_archive_of_a_ckpt_holds_what_web_uis_admit_and_nothing_else(tmp_path: Path) -> None:
    """A1111 1.10.1, modules/safe.py: its pattern for the names, its list of classes."""
    save_ckpt(make_tensors(torch.float16), tmp_path / "x.ckpt")
    with zipfile.ZipFile(tmp_path / "x.ckpt") as archive:
        assert archive.testzip() is None
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert sorted(archive.namelist()) == [
            *("archive/data.pkl", "archive/data/0", "archive/data/1", "archive/data/2"),
            *("archive/data/3", "archive/data/4", "archive/version"),
        ]
        assert archive.read("archive/version") == b"3\n"
        operations = list(pickletools.genops(archive.read("archive/data.pkl")))
    classes = {argument for code, argument, _ in operations if code.name == "GLOBAL"}
    assert classes == {
        *("collections OrderedDict", "torch HalfStorage", "torch._utils _rebuild_tensor_v2"),
    }
    assert {code.proto for code, _, _ in operations} <= {0, 1, 2}


def test_the_archive_reads_as_the_one_that_torch_would_write(tmp_path: Path) -> None:
    tensors = make_tensors(torch.bfloat16)
    save_ckpt(tensors, tmp_path / "ours.ckpt")
    torch.save({"state_dict": tensors}, tmp_path / "torch.ckpt")
    with zipfile.ZipFile(tmp_path / "torch.ckpt") as theirs:
        names = {name.partition("/")[2]: name for name in theirs.namelist()}
        with zipfile.ZipFile(tmp_path / "ours.ckpt") as ours:
            for entry in ours.namelist():
                if "/data/" in entry or entry.endswith("version"):
                    name = names[entry.removeprefix("archive/")]
                    assert ours.read(entry) == theirs.read(name)


def test_every_tensor_of_a_ckpt_begins_at_a_multiple_of_64_bytes(tmp_path: Path) -> None:
    save_ckpt(make_tensors(torch.float16), tmp_path / "x.ckpt")
    loaded = torch.load(tmp_path / "x.ckpt", weights_only=True, mmap=True)["state_dict"]
    assert {tensor.data_ptr() % 64 for tensor in loaded.values()} == {0}


@each_saver
def test_the_same_tensors_give_the_same_bytes(tmp_path: Path, name: str, save: Saver) -> None:
    first = save(make_tensors(), tmp_path / name).sha256
    assert save(make_tensors(), tmp_path / name).sha256 == first


def test_safetensors_carry_the_metadata(tmp_path: Path) -> None:
    save_safetensors(make_tensors(), tmp_path / "x.safetensors", {"session": "犬"})
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "session": "犬"}


@each_saver
def test_others_may_read_the_file_as_any_other(tmp_path: Path, name: str, save: Saver) -> None:
    (tmp_path / "plain").touch()
    save(make_tensors(), tmp_path / name)
    assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


def check_untouched(path: Path) -> None:
    assert path.read_bytes() == b"the old model"
    assert list(path.parent.iterdir()) == [path]


@each_saver
@pytest.mark.parametrize("damage", ["value", "dtype", "shape", "name", "lost"])
def test_a_file_that_reads_back_changed_does_not_take_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, save: Saver, damage: str
) -> None:
    (tmp_path / name).write_bytes(b"the old model")
    meant = make_tensors()
    compare = single_file._compare

    def compare_with_others(names, read, written, path) -> None:
        wrong = dict(written)
        value = wrong.pop("a.bias")
        wrong |= {
            "value": {"a.bias": value + 1e-6},
            "dtype": {"a.bias": value.double()},
            "shape": {"a.bias": value[:, None]},
            "name": {"a.bias2": value},
            "lost": {},
        }[damage]
        compare(names, read, wrong, path)

    monkeypatch.setattr(single_file, "_compare", compare_with_others)
    with pytest.raises(CheckpointError, match=r"reads back .*check the disk") as why:
        save(meant, tmp_path / name)
    assert name in str(why.value)
    check_untouched(tmp_path / name)


@each_saver
def test_not_a_number_is_kept_bit_for_bit(tmp_path: Path, name: str, save: Saver) -> None:
    tensors = {"x": torch.tensor([float("nan"), -0.0])}
    save(tensors, tmp_path / name)
    assert read(tmp_path / name)["x"].view(torch.int32).equal(tensors["x"].view(torch.int32))


@each_saver
@pytest.mark.parametrize("kind", [OSError(errno.EIO, "gone"), KeyboardInterrupt()])
def test_an_exception_in_the_middle_leaves_the_old_file_and_no_litter(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    name: str,
    save: Saver,
    kind: BaseException,
) -> None:
    (tmp_path / name).write_bytes(b"the old model")

    def fail(*args: object) -> None:
        assert len(list(tmp_path.iterdir())) == 2
        raise kind

    monkeypatch.setattr(single_file, "_bytes_of", fail)
    expected = WorkspaceError if isinstance(kind, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        save(make_tensors(), tmp_path / name)
    check_untouched(tmp_path / name)


@each_saver
def test_a_disk_that_fills_is_told_as_such_and_leaves_the_old_file(
    tmp_path: Path, name: str, save: Saver
) -> None:
    """A limit on the size of files plays the full disk; the system's answer is as real."""
    (tmp_path / name).write_bytes(b"the old model")
    usual = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(WorkspaceError, match=rf"cannot write .*{name}: File too large") as why:
            save(make_tensors(), tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, usual)
    assert why.value.errno == errno.EFBIG
    assert "\n" not in str(why.value)
    check_untouched(tmp_path / name)


@each_saver
def test_a_folder_that_is_gone_is_told_as_such(tmp_path: Path, name: str, save: Saver) -> None:
    with pytest.raises(WorkspaceError, match="still mounted"):
        save(make_tensors(), tmp_path / "gone" / name)


# A child that says when its file is half written, or written and about to be compared.
CHILD = """
import sys, time
from pathlib import Path
import torch
from colabtools.checkpoints import single_file

def stop(*args):
    print("in the middle", flush=True)
    time.sleep(60)

single_file._bytes_of = stop
save = getattr(single_file, sys.argv[1])
save({"a": torch.zeros(100_000)}, Path(sys.argv[2]))
"""


@pytest.mark.slow
@each_saver
def test_a_killed_process_leaves_the_old_file_whole(tmp_path: Path, name: str, save: Saver) -> None:
    path = tmp_path / name
    path.write_bytes(b"the old model")
    argv = [sys.executable, "-c", CHILD, save.__name__, str(path)]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "in the middle\n"
        assert len(list(tmp_path.iterdir())) == 2
        child.kill()
        assert child.wait(timeout=30) == -signal.SIGKILL
    assert path.read_bytes() == b"the old model"
    # What a killed process cannot remove is hidden, and the next save works all the same.
    assert all(rest.name.startswith(".") for rest in tmp_path.iterdir() if rest != path)
    save(make_tensors(), path)
    assert same(read(path), make_tensors())
