"""The workspace and the rule for writing, on real folders; a failing disk is played by errno."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from colabtools import drive
from colabtools.drive import Workspace, atomic_path, open_local, sha256_of, write_atomic
from colabtools.errors import ImageError, WorkspaceError


def fail_with(number: int) -> Callable[..., Any]:
    """A system call that always fails with this errno."""

    def call(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def test_the_paths_are_those_that_existing_users_have(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert workspace.sessions_dir == tmp_path / "Fast-Dreambooth" / "Sessions"
    assert workspace.sd_dir == tmp_path / "sd"
    assert workspace.internal_dir == tmp_path / ".colabtools"


def test_opening_makes_the_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    workspace = open_local(tmp_path / "a" / "b")
    assert workspace.root == tmp_path / "a" / "b"
    assert list(workspace.root.iterdir()) == []


def test_opening_again_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("kept")
    open_local(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["model.txt"]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_local("~/work").root == tmp_path / "work"
    assert (tmp_path / "work").is_dir()


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_local("work").root == tmp_path / "work"


@pytest.mark.parametrize("text", ["", "  ", "a\0b"])
def test_no_path_is_refused(text: str) -> None:
    with pytest.raises(WorkspaceError, match="no workspace folder in .*give one"):
        open_local(text)


def test_an_unknown_home_is_refused() -> None:
    with pytest.raises(WorkspaceError, match="no home folder"):
        open_local("~no-such-user-here/x")


@pytest.mark.parametrize("inside", ["", "deeper", "deeper/still"])
def test_a_file_in_the_way_is_refused_and_kept(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WorkspaceError, match="a file stands where a folder is needed") as caught:
        open_local(tmp_path / "file" / inside)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("folder", ["/proc/colabtools-test", "/sys/colabtools-test/deeper"])
def test_a_real_unwritable_place_is_refused_even_for_root(folder: str) -> None:
    with pytest.raises(WorkspaceError, match=f"cannot use as the workspace {folder}: .*errno"):
        open_local(folder)
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EROFS, "read-only: choose another folder"),
        (errno.ENOSPC, "B free\\); free some room"),
        (errno.EACCES, "may write to"),
        (errno.ENOTCONN, "mount it again"),
        (errno.EIO, "mount it again"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_the_probe_is_named_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str, call: str
) -> None:
    monkeypatch.setattr(os, call, fail_with(number))
    with pytest.raises(WorkspaceError, match=advice) as caught:
        open_local(tmp_path / "made" / "here")
    assert caught.value.errno == number
    assert str(tmp_path / "made" / "here") in str(caught.value)
    assert os.strerror(number) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays_when_the_probe_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fail_with(errno.EROFS))
    with pytest.raises(WorkspaceError):
        open_local(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_fsync_is_proven_by_reading_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fail_with(errno.EINVAL))
    assert open_local(tmp_path / "fuse").root.is_dir()


def test_a_disk_that_gives_back_other_bytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"rotten")
    with pytest.raises(WorkspaceError, match="gave back other bytes"):
        open_local(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_enough_space_passes_and_too_little_says_how_much(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    free = workspace.free_bytes()
    assert free > 0
    workspace.ensure_space(1, "a note")
    with pytest.raises(WorkspaceError, match=r"no room for SDXL .* needs .* GB and .* free") as why:
        workspace.ensure_space(free + 10**12, "SDXL")
    assert why.value.errno == errno.ENOSPC


def test_the_space_of_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="still mounted"):
        Workspace(tmp_path / "gone").free_bytes()


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
    message = str(drive.workspace_error("write", "/no/such/folder/x", full))
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
    assert drive.is_remote(tmp_path / "My Drive" / "x") is remote
