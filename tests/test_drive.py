"""The workspace: a local folder, and Google Drive behind a stand-in for google.colab."""

from __future__ import annotations

import errno
import os
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colabtools import drive
from colabtools.drive import Workspace, open_local
from colabtools.env import Probes
from colabtools.errors import MountError, StorageFullError, StorageLostError, WorkspaceError


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
    with pytest.raises(
        StorageFullError, match=r"no room for SDXL .* needs .* GB and .* free"
    ) as why:
        workspace.ensure_space(free + 10**12, "SDXL")
    assert why.value.errno == errno.ENOSPC


def test_a_mount_that_knows_no_sizes_refuses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = types.SimpleNamespace(total=0, used=0, free=0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: unknown)
    Workspace(tmp_path).ensure_space(10**15, "SDXL")


def test_the_space_of_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="still mounted"):
        Workspace(tmp_path / "gone").free_bytes()


class MessageError(Exception):
    """As google.colab raises it; only its name and words are known to us."""


class FakeColab:
    """Stands in for google.colab.drive at the border: what it did before, it does here.

    Attributes:
        outcomes: what each call of `mount` does: an error is raised, "mounts" puts My Drive there,
            "nothing" prints and returns; the last one stays.
        asked: the options of each call.
    """

    def __init__(self, flaky: Any) -> None:
        self.flaky = flaky
        self.outcomes: list[Any] = ["mounts"]
        self.asked: list[dict[str, Any]] = []
        self.shared = ["Team", "Familie Müller"]
        self.flushed: list[Any] = []

    @property
    def mountpoint(self) -> str:
        return str(self.flaky.root)

    def mount(self, mountpoint: str, **options: Any) -> None:
        assert mountpoint == self.mountpoint
        self.asked.append(options)
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome == "mounts":
            self.flaky.recover()
            (self.flaky.root / "MyDrive").mkdir(exist_ok=True)
            for name in self.shared:
                (self.flaky.root / "Shareddrives" / name).mkdir(parents=True, exist_ok=True)

    def flush_and_unmount(self) -> None:
        self.flushed.append(True)
        if isinstance(self.outcomes[0], BaseException):
            raise self.outcomes[0]

    def open(self, place: str = "MyDrive") -> Workspace:
        return drive.mount(place, mountpoint=self.mountpoint, probes=HOSTED)


HOSTED = Probes(
    environ={"COLAB_RELEASE_TAG": "release-colab_20260101"},
    has_module=lambda name: name == "google.colab",
    in_zmq_kernel=lambda: True,
    in_colab_shell=lambda: True,
)


@pytest.fixture
def colab(flaky: Any, monkeypatch: pytest.MonkeyPatch) -> FakeColab:
    fake = FakeColab(flaky)
    package = types.ModuleType("google.colab")
    package.drive = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setattr(drive, "time", types.SimpleNamespace(sleep=flaky.slept.append))
    return fake


def test_a_local_folder_needs_no_colab(tmp_path: Path) -> None:
    assert drive.mount(str(tmp_path / "here")).root == tmp_path / "here"


@pytest.mark.parametrize(
    ("place", "folder"),
    [
        ("MyDrive", "MyDrive"),
        ("MyDrive/art/2026", "MyDrive/art/2026"),
        ("{mountpoint}/MyDrive/art", "MyDrive/art"),
        ("Shareddrives/Team", "Shareddrives/Team"),
        ("Shareddrives/Familie Müller/a b", "Shareddrives/Familie Müller/a b"),
    ],
)
def test_drive_is_mounted_once_and_the_place_in_it_proven(
    colab: FakeColab, place: str, folder: str
) -> None:
    place = place.format(mountpoint=colab.mountpoint)
    workspace = colab.open(place)
    assert workspace.root == colab.flaky.root / folder
    assert list(workspace.root.iterdir()) == []
    assert colab.open(place) == workspace
    assert colab.asked == [{"force_remount": False, "timeout_ms": 120000}]


@pytest.mark.parametrize(
    ("failure", "kind", "said", "times"),
    [
        (MessageError("Error: credential propagation was unsuccessful"), MountError, "allow it", 1),
        (NotImplementedError("unsupported in this environment"), MountError, "Enterprise", 1),
        (ValueError("Mountpoint must not already contain files"), MountError, "move them away", 1),
        (ValueError("Mountpoint must not be a symlink"), MountError, "use /content/drive", 1),
        (ValueError("mount failed"), StorageLostError, "start a new one", 3),
        (TimeoutError("timed out"), StorageLostError, "TimeoutError: timed out", 3),
        (OSError(errno.ENOTCONN, "Transport endpoint"), StorageLostError, "Transport", 3),
        ("nothing", MountError, "though no error was given", 3),
    ],
)
def test_each_failure_of_colab_is_an_error_with_the_next_step(
    colab: FakeColab, failure: Any, kind: type[WorkspaceError], said: str, times: int
) -> None:
    colab.outcomes = [failure]
    with pytest.raises(kind, match=said) as caught:
        colab.open()
    assert "\n" not in str(caught.value)
    assert len(colab.asked) == times


@pytest.mark.parametrize("failure", [ValueError("mount failed"), TimeoutError(), "nothing"])
def test_what_may_pass_is_tried_again_with_a_new_mount(colab: FakeColab, failure: Any) -> None:
    colab.outcomes = [failure, "mounts"]
    assert colab.open().root == colab.flaky.root / "MyDrive"
    forced = [options["force_remount"] for options in colab.asked]
    assert forced == [False, failure != "nothing"]


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.EIO])
def test_a_mountpoint_whose_server_died_is_mounted_anew(
    colab: FakeColab, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    colab.open()
    dead = [True]
    stat = os.stat

    def failing(path: Any, *args: Any, **options: Any) -> Any:
        if dead[0] and colab.flaky.holds(path):
            raise OSError(number, os.strerror(number), path)
        return stat(path, *args, **options)

    mount = colab.mount

    def revive(mountpoint: str, **options: Any) -> None:
        dead[0] = not options["force_remount"]
        mount(mountpoint, **options)

    monkeypatch.setattr(os, "stat", failing)
    monkeypatch.setattr(colab, "mount", revive)
    assert colab.open().root == colab.flaky.root / "MyDrive"
    assert colab.asked[-1]["force_remount"] is True


def test_a_folder_of_that_name_on_the_runtimes_own_disk_is_no_drive(
    colab: FakeColab, monkeypatch: pytest.MonkeyPatch
) -> None:
    (colab.flaky.root / "MyDrive").mkdir()
    import psutil

    monkeypatch.setattr(psutil, "disk_partitions", lambda *, all: [])  # noqa: A006
    colab.outcomes = ["nothing"]
    with pytest.raises(MountError, match="not mounted"):
        colab.open()
    assert list((colab.flaky.root / "MyDrive").iterdir()) == []


def test_a_drive_that_appears_late_is_waited_for(colab: FakeColab) -> None:
    colab.outcomes = ["nothing", "nothing", "mounts"]
    assert colab.open().root.is_dir()


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StorageFullError),
        (errno.EDQUOT, StorageFullError),
        (errno.EIO, StorageLostError),
        (errno.ENOTCONN, StorageLostError),
        (errno.EACCES, WorkspaceError),
    ],
)
def test_a_drive_that_keeps_no_file_is_told_when_it_is_opened(
    colab: FakeColab, number: int, kind: type[WorkspaceError]
) -> None:
    colab.open()
    colab.flaky.fail("write", number)
    with pytest.raises(WorkspaceError, match=f"errno {number}") as caught:
        colab.open()
    assert type(caught.value) is kind
    assert caught.value.errno == number


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_shared_drive_that_may_only_be_read_names_the_role(colab: FakeColab, number: int) -> None:
    colab.open("Shareddrives/Team")
    colab.flaky.fail("write", number)
    with pytest.raises(MountError, match="'Team' lets you read only .* Contributor"):
        colab.open("Shareddrives/Team")


def test_a_shared_drive_that_is_not_there_is_told_with_those_that_are(colab: FakeColab) -> None:
    with pytest.raises(MountError, match="no shared drive 'team'; there is Familie Müller, Team"):
        colab.open("Shareddrives/team/x")
    assert not (colab.flaky.root / "Shareddrives" / "team").exists()


def test_an_account_without_shared_drives_is_told(colab: FakeColab) -> None:
    colab.shared = []
    with pytest.raises(MountError, match="there are none"):
        colab.open("Shareddrives/Team")
    assert not (colab.flaky.root / "Shareddrives").exists()


@pytest.mark.parametrize(
    ("place", "said"),
    [("Shareddrives", "names no shared drive"), ("MyDrive/../../etc", "leads out of Drive")],
)
def test_a_place_that_is_none_is_refused_before_anyone_is_asked(
    colab: FakeColab, place: str, said: str
) -> None:
    with pytest.raises(WorkspaceError, match=said):
        colab.open(place)
    assert colab.asked == []


def test_off_colab_there_is_no_drive_to_mount() -> None:
    probes = Probes(environ={}, has_module=lambda name: False)
    with pytest.raises(MountError, match="hosted Colab only; give a local folder"):
        drive.mount("MyDrive", mountpoint="/no/such/mountpoint", probes=probes)


@pytest.mark.parametrize("where", ["a child process", "a thread"])
def test_what_no_cell_runs_cannot_ask_for_consent_but_uses_what_is_mounted(
    colab: FakeColab, where: str
) -> None:
    child = Probes(
        environ=HOSTED.environ, has_module=HOSTED.has_module, in_zmq_kernel=lambda: False
    )
    results: list[Any] = []

    def attempt() -> None:
        try:
            probes = HOSTED if where == "a thread" else child
            results.append(drive.mount("MyDrive", mountpoint=colab.mountpoint, probes=probes))
        except MountError as error:
            results.append(str(error))

    def run() -> None:
        if where != "a thread":
            return attempt()
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
        return None

    run()
    assert "only a notebook's cell can ask for it" in results[0]
    assert colab.asked == []
    colab.open()
    run()
    assert results[1] == Workspace(colab.flaky.root / "MyDrive")


def test_everything_has_arrived_before_drive_is_let_go(colab: FakeColab) -> None:
    assert drive.flush(Probes(environ={}, has_module=lambda name: False)) is False
    assert colab.flushed == []
    assert drive.flush(HOSTED) is True
    assert colab.flushed == [True]
    colab.outcomes = [ValueError("flush_and_unmount failed")]
    with pytest.raises(StorageLostError, match="has not taken everything"):
        drive.flush(HOSTED)
