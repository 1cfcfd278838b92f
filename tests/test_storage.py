"""The rule for writing, on real folders, and on one that fails and lags as Google Drive does."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from colabtools import storage
from colabtools.errors import (
    CheckpointError,
    ImageError,
    StorageFullError,
    StorageLostError,
    WorkspaceError,
)
from colabtools.storage import atomic_path, patiently, remove_parts, sha256_of, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_atomic_makes_then_replaces_and_leaves_no_rest(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_atomic(target, b"old")
    write_atomic(target, b"new")
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def test_the_temporary_file_is_hidden_beside_the_target(tmp_path: Path) -> None:
    with atomic_path(tmp_path / f"{'ä' * 120}.bin") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".")
        assert temporary.name.endswith(".part")
        temporary.write_bytes(b"x")
        assert list(tmp_path.iterdir()) == [temporary]


def test_a_new_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomic(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_file_and_no_rest(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    target = tmp_path / "model"
    target.write_bytes(b"old")
    with pytest.raises(kind), atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise kind("stop")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_check_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    target = tmp_path / "picture"
    target.write_bytes(b"old")

    def refuse(temporary: Path) -> None:
        assert temporary.read_bytes() == b"new"
        assert target.read_bytes() == b"old"
        raise ImageError("not a picture")

    with pytest.raises(ImageError), atomic_path(target, verify=refuse) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_order_is_sync_then_check_then_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append("sync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("rename"), replace(a, b))[1])
    with atomic_path(tmp_path / "x", verify=lambda path: steps.append("check")) as temporary:
        temporary.write_bytes(b"x")
    assert steps == ["sync", "check", "rename", "sync"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="nothing was written"), atomic_path(tmp_path / "x"):
        pass


def test_the_folder_is_not_made_behind_the_users_back(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="still mounted") as caught:
        write_atomic(tmp_path / "dropped" / "x", b"x")
    assert caught.value.errno == errno.ENOENT
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOTCONN, errno.EIO, errno.EROFS])
def test_storage_failures_in_the_block_get_the_next_step(tmp_path: Path, number: int) -> None:
    said = rf"errno {number}"
    with pytest.raises(WorkspaceError, match=said) as caught, atomic_path(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
    assert caught.value.errno == number
    assert isinstance(caught.value.__cause__, OSError)


def test_other_os_errors_of_the_block_are_not_blamed_on_the_target(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="source"), atomic_path(tmp_path / "x"):
        (tmp_path / "source").read_bytes()


def test_a_full_disk_is_told_with_what_is_free() -> None:
    full = OSError(errno.ENOSPC, "full")
    message = str(storage.workspace_error("write", "/no/such/folder/x", full))
    assert message.startswith("cannot write /no/such/folder/x: No space left on device (errno 28, ")
    assert " free); " in message


def test_a_real_full_device_is_an_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with (
        pytest.raises(WorkspaceError, match="errno 28") as caught,
        atomic_path("/tmp/colabtools-full"),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert caught.value.errno == errno.ENOSPC


def test_sha256_reads_files_of_more_than_one_piece(tmp_path: Path) -> None:
    data = os.urandom(2 * 1024**2 + 7)
    (tmp_path / "big").write_bytes(data)
    assert sha256_of(tmp_path / "big") == hashlib.sha256(data).hexdigest()


def test_sha256_of_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="cannot read .*gone"):
        sha256_of(tmp_path / "gone")


@pytest.mark.parametrize(
    ("file_system", "remote"), [("fuse.drive", True), ("nfs4", True), ("ext4", False), ("", False)]
)
def test_a_folder_is_remote_by_the_file_system_that_it_is_mounted_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_system: str, remote: bool
) -> None:
    import psutil

    mounts = [
        SimpleNamespace(mountpoint="/", fstype="ext4"),
        SimpleNamespace(mountpoint=str(tmp_path), fstype=file_system),
        SimpleNamespace(mountpoint=str(tmp_path / "other"), fstype="fuse"),
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda *, all: mounts)  # noqa: A006
    assert storage.is_remote(tmp_path / "My Drive" / "x") is remote


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StorageFullError),
        (errno.EDQUOT, StorageFullError),
        (errno.EIO, StorageLostError),
        (errno.ENOTCONN, StorageLostError),
        (errno.EROFS, WorkspaceError),
    ],
)
@pytest.mark.parametrize("call", ["write", "rename"])
def test_a_drive_that_fails_for_good_is_a_typed_error_and_the_old_file_stays(
    flaky: Any, number: int, kind: type[WorkspaceError], call: str
) -> None:
    target = flaky.root / "session.json"
    write_atomic(target, b"old")
    flaky.fail(call, number)
    with pytest.raises(WorkspaceError, match=f"errno {number}") as caught:
        write_atomic(target, b"new")
    assert type(caught.value) is kind
    assert caught.value.errno == number
    assert "\n" not in str(caught.value)
    flaky.recover()
    assert target.read_bytes() == b"old"
    assert names(flaky.root) == ["session.json"]
    write_atomic(target, b"new")
    assert target.read_bytes() == b"new"


def test_a_failure_that_passes_is_tried_once_more_and_only_behind_a_network(
    flaky: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky.fail("write", errno.EIO, times=1)
    write_atomic(flaky.root / "a", b"there")
    assert (flaky.root / "a").read_bytes() == b"there"
    assert flaky.slept == [0.2]

    def broken(*args: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(StorageLostError):
        write_atomic(tmp_path / "local", b"x")
    assert flaky.slept == [0.2]


@pytest.mark.parametrize("late", [2, 4])
def test_a_write_that_appears_late_is_waited_for(flaky: Any, late: int) -> None:
    flaky.late = late
    write_atomic(flaky.root / "a", b"there")
    assert flaky.slept
    flaky.late = 0
    assert (flaky.root / "a").read_bytes() == b"there"


def test_a_write_that_never_appears_is_an_error_after_some_seconds(flaky: Any) -> None:
    flaky.late = 100
    with pytest.raises(WorkspaceError):
        write_atomic(flaky.root / "a", b"there")
    assert 5 < sum(flaky.slept) < 60


def test_a_check_that_saw_too_little_looks_again_behind_a_network_only(
    flaky: Any, tmp_path: Path
) -> None:
    answers = [CheckpointError("cut off"), CheckpointError("cut off")]

    def check() -> str:
        if answers:
            raise answers.pop()
        return "whole"

    assert patiently(check, flaky.root) == "whole"
    answers.append(CheckpointError("cut off"))
    with pytest.raises(CheckpointError):
        patiently(check, tmp_path)
    assert flaky.slept == [0.2, 0.8]


def test_a_drive_without_fsync_keeps_the_rule(flaky: Any) -> None:
    flaky.no_fsync = True
    write_atomic(flaky.root / "a", b"there")
    assert (flaky.root / "a").read_bytes() == b"there"


def test_what_a_killed_process_left_beside_a_file_goes_and_no_more(tmp_path: Path) -> None:
    kept = ["model.ckpt", ".model.ckpt.part", ".other-0123abcd.part", ".model.ckpt-zz.part"]
    for name in [*kept, ".model.ckpt-0123abcd.part", ".model.ckpt-aaaaaaaa.part"]:
        (tmp_path / name).touch()
    remove_parts(tmp_path / "model.ckpt")
    assert names(tmp_path) == sorted(kept)
    remove_parts(tmp_path)
    assert names(tmp_path) == sorted(set(kept) - {".other-0123abcd.part"})
    remove_parts(tmp_path / "gone" / "model")
