"""Whatever goes wrong while writing: the destination is as it was, and nothing lies about."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from colabtools.checkpoints import copying, output, placing
from colabtools.checkpoints.headers import read_safetensors_header
from colabtools.checkpoints.output import FolderPlan, write_file, write_folder
from colabtools.checkpoints.plan import Target, plan_plain
from colabtools.checkpoints.sources import LiveTensor, live_tensors
from colabtools.drive import sha256_of
from colabtools.errors import CheckpointError, WorkspaceError

from .conftest import file_content, write_rows

SIZE = 3_000_000
SUFFIXES = ("ckpt", "safetensors")


@pytest.fixture
def targets(tmp_path_factory: pytest.TempPathFactory) -> list[Target]:
    """Ten tensors of 3 MB that lie in one file."""
    data = np.random.default_rng(0).bytes(SIZE)
    rows = {f"t{n}": ("F16", (SIZE // 2,), bytes([n]) + data[1:]) for n in range(10)}
    path = write_rows(tmp_path_factory.mktemp("source") / "s.safetensors", rows)
    return plan_plain(read_safetensors_header(path).tensors)


@pytest.fixture(autouse=True)
def _own_machine(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks of this test alone, in this process and in those that it starts."""
    folder = str(tmp_path_factory.mktemp("machine"))
    monkeypatch.setattr(tempfile, "tempdir", folder)
    monkeypatch.setenv("TMPDIR", folder)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A file that is there already, and must be the only thing there at the end."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"the old model")
    yield path
    assert list(tmp_path.iterdir()) == [path]


def locks() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"colabtools-{os.getuid()}-*.lock"))


def without_unnamed_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Drive: the file system has no files without names."""
    monkeypatch.setattr(placing, "_UNNAMED", None)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written_has_the_bytes_and_the_digest(
    targets: list[Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, named: bool
) -> None:
    if named:
        without_unnamed_files(monkeypatch)
    path = tmp_path / f"m.{suffix}"
    for verify in (True, False):
        written = write_file(path, targets, {}, verify=verify)
        assert written.size_bytes == path.stat().st_size
        assert written.sha256 == (sha256_of(path) if verify else "")
    data = path.read_bytes()
    assert all(data.count(bytes([n]) + data[-2000:-1990]) <= 1 for n in range(3))
    if suffix == "safetensors":
        source = targets[0].pieces[0].source
        assert file_content(path) == file_content(source.path)  # type: ignore[union-attr]
        assert read_safetensors_header(path).tensors["t0"].begin % 4096 == source.begin % 4096  # type: ignore[union-attr]
    assert list(tmp_path.iterdir()) == [path]
    assert locks() == []


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_disk_that_fills_up_leaves_the_old_file(
    targets: list[Target], target: Path, monkeypatch: pytest.MonkeyPatch, part: float, named: bool
) -> None:
    """A limit on the size of files plays the full disk; the system's answer is as real."""
    if named:
        without_unnamed_files(monkeypatch)
    monkeypatch.setattr(placing.Unplaced, "reserve", lambda *_: None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for path in (target, target.with_suffix(".ckpt")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(part * 10 * SIZE), limits[1]))
        try:
            with pytest.raises(WorkspaceError, match="cannot write .*: File too large") as why:
                write_file(path, targets, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert why.value.errno == errno.EFBIG
        assert path.name in str(why.value)
    assert target.read_bytes() == b"the old model"


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_disk_that_is_too_small_is_known_before_anything_is_copied(
    targets: list[Target], target: Path, monkeypatch: pytest.MonkeyPatch, on_disk: bool
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def little(descriptor: int) -> os.statvfs_result:
        return os.statvfs_result((4096, 4096, 10**9, 7000, 7000, 0, 0, 0, 0, 255))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(os, "fstatvfs", little)
    monkeypatch.setattr(os, "major", lambda _: int(on_disk))
    monkeypatch.setattr(copying.Copier, "literal", lambda *_: pytest.fail("it was written to"))
    with pytest.raises(WorkspaceError, match="No space left .*free some room") as why:
        write_file(target, targets, {})
    assert why.value.errno == errno.ENOSPC
    assert target.read_bytes() == b"the old model"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.EIO, "gone")])
def test_an_interrupt_in_the_middle_leaves_the_old_file(
    targets: list[Target], target: Path, monkeypatch: pytest.MonkeyPatch, *,
    suffix: str, failure: BaseException,
) -> None:  # fmt: skip
    seen = []

    def count(self: Any, size: int) -> None:
        seen.append(size)
        if len(seen) == 3:
            raise failure

    monkeypatch.setattr(output, "_in_megabytes", lambda _: lambda size: count(None, size))
    kind = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else WorkspaceError
    with pytest.raises(kind):
        write_file(target.with_suffix(f".{suffix}"), targets, {})
    assert target.read_bytes() == b"the old model"


CHILD = """
import sys, time
from pathlib import Path
from colabtools.checkpoints import output, placing
from colabtools.checkpoints.headers import read_safetensors_header
from colabtools.checkpoints.plan import plan_plain
if sys.argv[3] == "named":
    placing._UNNAMED = None
def stop(_):
    def count(size):
        print("in the middle", flush=True)
        time.sleep(60)
    return count
output._in_megabytes = stop
targets = plan_plain(read_safetensors_header(Path(sys.argv[1])).tensors)
output.write_file(Path(sys.argv[2]), targets, {})
"""


@pytest.mark.parametrize("named", ["named", "unnamed"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_killed_process_leaves_the_old_file_and_no_litter(
    targets: list[Target], target: Path, suffix: str, named: str
) -> None:
    source = targets[0].pieces[0].source.path  # type: ignore[union-attr]
    path = target.with_suffix(f".{suffix}")
    argv = [sys.executable, "-c", CHILD, str(source), str(path), named]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "in the middle\n"
        with pytest.raises(WorkspaceError, match="another conversion is writing"):
            write_file(path, targets, {})
        child.kill()
        assert child.wait(timeout=30) == -signal.SIGKILL
    assert target.read_bytes() == b"the old model"
    left = [rest for rest in path.parent.iterdir() if rest != target]
    # Only where the file system has no unnamed files is there a hidden one, which is used again.
    assert [rest.name[0] for rest in left] == (["."] if named == "named" else [])
    if named == "named":
        write_file(path, targets, {})
        left[0].unlink(missing_ok=True)
        if path != target:
            path.unlink()
        target.write_bytes(b"the old model")
        assert locks() == []
    for lock in locks():
        lock.unlink()


def test_two_conversions_to_one_target_at_once(
    targets: list[Target], target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = output._Job.fill

    def meanwhile(self: Any, *args: Any) -> Any:
        with pytest.raises(WorkspaceError, match="another conversion is writing .*m.safetensors"):
            write_file(target, targets, {})
        return first(self, *args)

    monkeypatch.setattr(output._Job, "fill", meanwhile)
    write_file(target, targets, {})
    assert file_content(target).keys() == {f"t{n}" for n in range(10)}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("at", [5, SIZE + 5_000, 10 * SIZE])
def test_a_byte_that_the_disk_gives_back_changed_is_found(
    targets: list[Target], target: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, at: int
) -> None:
    fill = copying._fill_view

    def changing(descriptor: int, offset: int, view: memoryview, path: Path) -> None:
        fill(descriptor, offset, view, path)
        if path == target.with_suffix(f".{suffix}") and offset <= at < offset + len(view):
            view[at - offset] ^= 1

    monkeypatch.setattr(copying, "_fill_view", changing)
    with pytest.raises(CheckpointError, match="reads back changed from .*check the disk"):
        write_file(target.with_suffix(f".{suffix}"), targets, {})
    assert target.read_bytes() == b"the old model"


def test_a_source_that_shrinks_meanwhile_is_named(targets: list[Target], target: Path) -> None:
    source = targets[0].pieces[0].source.path  # type: ignore[union-attr]
    os.truncate(source, 20_000_000)
    for path in (target, target.with_suffix(".ckpt")):
        with pytest.raises(CheckpointError, match=r"s\.safetensors ends at byte 20000000"):
            write_file(path, targets, {})
    assert target.read_bytes() == b"the old model"


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EINVAL, errno.ENOSYS])
def test_where_the_kernel_cannot_copy_memory_does(
    targets: list[Target], target: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    plain = write_file(target, targets, {}).sha256
    monkeypatch.setattr(os, "copy_file_range", refuse)
    assert write_file(target, targets, {}).sha256 == plain


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no second file system")
def test_a_destination_on_another_file_system(targets: list[Target], tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        if Path(other).stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("both are one file system")
        here, there = (
            write_file(Path(d) / "m.safetensors", targets, {}) for d in (tmp_path, other)
        )
        assert here.sha256 == there.sha256


def test_a_folder_that_cannot_be_put_together_leaves_the_old_one(
    targets: list[Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    plan = FolderPlan({"unet/a.safetensors": targets[:2], "vae/b.safetensors": targets[2:]},
                      {"model_index.json": b"{}"})  # fmt: skip
    write_folder(folder, plan, {})
    (folder / "model_index.json").write_bytes(b"old")
    rename = Path.rename

    def fail(self: Path, other: Path) -> Path:
        if other == folder and self.name.endswith(".part"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(WorkspaceError, match="Input/output error"):
        write_folder(folder, plan, {})
    assert (folder / "model_index.json").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder / "vae" / "b.safetensors").is_file()


def test_live_tensors_are_written_and_cast(tmp_path: Path) -> None:
    import torch

    base = torch.randn(3, 5)
    state = {"view": base.t(), "whole": torch.arange(4), "scalar": torch.tensor(2.0)}
    written = write_file(tmp_path / "m.safetensors", plan_plain(live_tensors(state), "bf16"), {})
    found = file_content(written.path)
    meant = base.t().contiguous().to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert found["view"] == ("BF16", (5, 3), meant)
    assert found["whole"][:2] == ("I64", (4,))
    assert found["scalar"][:2] == ("BF16", ())
    with pytest.raises(CheckpointError, match="complex64, which no weight file"):
        live_tensors({"z": torch.zeros(1, dtype=torch.complex64)})


def test_a_live_tensor_that_changes_meanwhile_is_found(target: Path) -> None:
    import torch

    tensor = torch.zeros(1000)

    def load() -> torch.Tensor:
        return tensor.add_(1)

    plan = plan_plain({"t": LiveTensor("t", "F32", (1000,), load)})
    with pytest.raises(CheckpointError, match="t reads back changed"):
        write_file(target, plan, {})


def test_progress_counts_all_of_the_bytes(
    targets: list[Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    monkeypatch.setattr(output, "_in_megabytes", lambda _: counted.append)
    for suffix in SUFFIXES:
        counted.clear()
        write_file(tmp_path / f"m.{suffix}", targets, {})
        assert sum(counted) == 10 * SIZE
    monkeypatch.undo()
    steps: list[int] = []
    count = output._in_megabytes(steps.append)
    for _ in range(3):
        count(700_000)
    assert steps == [1, 1]
