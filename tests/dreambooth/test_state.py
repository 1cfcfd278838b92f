from __future__ import annotations

import errno
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from colabtools.dreambooth import saved as saved_module
from colabtools.dreambooth import state
from colabtools.dreambooth.session import Session
from colabtools.dreambooth.state import CheckpointStore, Snapshot
from colabtools.errors import CheckpointError, WorkspaceError


@pytest.fixture
def session(tmp_path: Path) -> Session:
    folder = tmp_path / "drive" / "robot"
    folder.mkdir(parents=True)
    return Session("robot", folder)


@pytest.fixture(autouse=True)
def _own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "machine").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "machine"))


@pytest.fixture
def staging(session: Session) -> Path:
    return state.local_checkpoints_dir(session)


def snapshot(step: int, value: float | None = None, *, finished: bool = False) -> Snapshot:
    value = float(step) if value is None else value
    return Snapshot(
        step=step,
        finished=finished,
        parts={"unet": {"a": torch.full((50,), value)}},
        trained=("unet",),
        state={} if finished else {"optimizer": {0: torch.full((9,), value)}, "lr": value},
        description={"base_model": "micro"},
    )


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir()) if place.exists() else []


def steps(place: Path) -> list[int]:
    """The steps that a place holds; anything that is not a checkpoint fails."""
    return [int(name.removeprefix("step-")) for name in names(place)]


def value(saved: state.Saved | None) -> float:
    """The number that every tensor of a `snapshot` holds."""
    assert saved is not None
    values = {*saved.load()["unet"]["a"].tolist()}
    if not saved.finished:
        tree = saved.load_state()
        values |= {*tree["optimizer"][0].tolist(), tree["lr"]}
    [number] = values
    return number


class Drive:
    """A folder that fails or hangs when files below it are opened to be written."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.code = 0
        self.open_gate = threading.Event()
        self.open_gate.set()
        real_open = Path.open

        def open_on_drive(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "w" in mode and path.is_relative_to(folder):
                assert self.open_gate.wait(20)
                if self.code:
                    raise OSError(self.code, os.strerror(self.code), str(path))
            return real_open(path, mode, *args, **kwargs)

        monkeypatch.setattr(Path, "open", open_on_drive)


@pytest.fixture
def drive(session: Session, monkeypatch: pytest.MonkeyPatch) -> Drive:
    return Drive(session.folder, monkeypatch)


# What is kept, and what is found.


def test_the_last_the_milestones_and_the_newest_result_are_kept(session: Session) -> None:
    with CheckpointStore(session, keep_last=2, keep_every=300) as store:
        for step in range(100, 1001, 100):
            store.save(snapshot(step))
        assert steps(session.checkpoints_dir) == [300, 600, 900, 1000]
        store.save(snapshot(1010, finished=True))
        store.save(snapshot(1020, finished=True))
        for step in (1030, 1040, 1050):
            store.save(snapshot(step))
    assert steps(session.checkpoints_dir) == [300, 600, 900, 1020, 1040, 1050]


def test_the_newest_is_the_one_saved_last_not_the_one_of_most_steps(session: Session) -> None:
    with CheckpointStore(session) as store:
        store.save(snapshot(500))
    with CheckpointStore(session) as store:
        store.save(snapshot(100))
        assert value(store.newest()) == 100
    assert [saved.step for saved in state.find_trained(session)] == [500, 100]


def test_the_order_survives_a_clock_that_was_set_back(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    CheckpointStore(session).save(snapshot(500))
    monkeypatch.setattr(state.time, "time_ns", lambda: 0)
    store = CheckpointStore(session)
    store.save(snapshot(100))
    assert value(store.newest()) == 100


def test_nothing_saved_is_none_and_an_unmounted_drive_is_an_error(session: Session) -> None:
    store = CheckpointStore(session)
    assert store.newest() is None
    session.folder.rmdir()
    with pytest.raises(WorkspaceError, match="cannot look for checkpoints in .*robot"):
        store.newest()
    with pytest.raises(WorkspaceError, match="cannot look for checkpoints in .*robot"):
        state.latest_trained(session)


@pytest.mark.parametrize("name", ["unet.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_one_is_skipped_with_a_warning(
    session: Session, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    store = CheckpointStore(session)
    store.save(snapshot(1))
    path = store.save(snapshot(2)).folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-4])
    assert value(store.newest()) == 1
    [message] = caplog.messages
    assert str(path) in message
    # It must not take the place of a whole one when old ones are removed.
    store.save(snapshot(3))
    assert value(store.newest()) == 3
    if damage != "flip" or name == "manifest.json":
        assert steps(session.checkpoints_dir) == [1, 2, 3]


def test_when_all_are_damaged_nothing_starts_over_silently(session: Session) -> None:
    store = CheckpointStore(session)
    (store.save(snapshot(1)).folder / "unet.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint of session 'robot' is whole: .*unet"):
        store.newest()
    assert CheckpointStore(session, fresh=True).newest() is None


def test_a_folder_of_another_name_is_never_picked_up(session: Session) -> None:
    store = CheckpointStore(session)
    folder = store.save(snapshot(5)).folder
    folder.rename(folder.with_name("step-5_v2"))
    assert store.newest() is None
    with pytest.raises(CheckpointError, match="'robot' has no trained weights; run train first"):
        state.latest_trained(session)


def test_a_fresh_run_replaces_the_former_once_it_is_safe(session: Session) -> None:
    with CheckpointStore(session, keep_every=100) as store:
        store.save(snapshot(100))
        store.save(snapshot(150, finished=True))
    with CheckpointStore(session, keep_every=100, fresh=True) as store:
        assert store.newest() is None
        assert steps(session.checkpoints_dir) == [100, 150]
        assert value(CheckpointStore(session).newest()) == 150
        store.save(snapshot(10))
        assert value(store.newest()) == 10
        # The former result stays until there is another one.
        assert steps(session.checkpoints_dir) == [10, 150]
        store.save(snapshot(100))
        store.save(snapshot(110))
        store.save(snapshot(120))
        assert steps(session.checkpoints_dir) == [100, 110, 120, 150]
        store.save(snapshot(130, finished=True))
    assert steps(session.checkpoints_dir) == [100, 130]


def test_what_only_the_machine_has_is_brought_home(
    session: Session, staging: Path, drive: Drive
) -> None:
    with CheckpointStore(session, staging=staging) as store:
        store.save(snapshot(1))
        store.wait()
        drive.code = errno.EIO
        store.save(snapshot(2))
        store.save(snapshot(3, finished=True))
    assert steps(session.checkpoints_dir) == [1]
    drive.code = 0
    with CheckpointStore(session, staging=staging) as store:
        store.send_stranded()
        store.wait()
        assert store.stranded is None
    assert steps(session.checkpoints_dir) == [3]
    with CheckpointStore(session, staging=staging) as store:
        store.send_stranded()
        assert store._thread is None


def test_a_session_made_anew_under_its_name_is_another_one(session: Session) -> None:
    before = state.local_checkpoints_dir(session)
    session.record_path.write_text(
        json.dumps({"schema_version": 1, "runs": [], "created": "2026-01-01T00:00:00+00:00"})
    )
    assert state.local_checkpoints_dir(session) != before


def test_all_can_be_removed(session: Session, staging: Path) -> None:
    with CheckpointStore(session, staging=staging) as store:
        store.save(snapshot(1))
        store.save(snapshot(2)).folder.joinpath("manifest.json").unlink()
        (session.checkpoints_dir / "mine_v2").mkdir()
        store.wait()
        store.remove_all()
        assert store.newest() is None
    assert (names(session.checkpoints_dir), names(staging)) == (["mine_v2"], [])


# The machine and the Drive.


def test_staging_does_not_wait_for_a_slow_drive(
    session: Session, staging: Path, drive: Drive
) -> None:
    drive.open_gate.clear()
    with CheckpointStore(session, staging=staging) as store:
        saved = store.save(snapshot(1))
        assert (saved.folder.parent, value(saved)) == (staging, 1)
        assert steps(staging) == [1]
        assert store.stranded == saved.folder
        drive.open_gate.set()
        store.wait()
        assert store.stranded is None
    assert [value(one) for one in state.find_trained(session)] == [1]
    assert steps(session.checkpoints_dir) == [1]


def test_the_next_save_is_safe_before_it_waits_for_the_former_copy(
    session: Session, staging: Path, drive: Drive
) -> None:
    drive.open_gate.clear()
    with CheckpointStore(session, staging=staging) as store:
        store.save(snapshot(1))
        second = threading.Thread(target=store.save, args=(snapshot(2),))
        second.start()
        while steps_without_litter(staging) != [1, 2]:
            assert second.is_alive()
        second.join(0.05)
        assert second.is_alive()
        drive.open_gate.set()
        second.join(20)
        assert not second.is_alive()
    assert steps(session.checkpoints_dir) == [1, 2]


def steps_without_litter(place: Path) -> list[int]:
    return [int(n.removeprefix("step-")) for n in names(place) if n.startswith("step-")]


def test_the_machine_keeps_few_and_the_session_what_was_asked(
    session: Session, staging: Path
) -> None:
    with CheckpointStore(session, keep_last=3, keep_every=2, staging=staging) as store:
        for step in range(1, 8):
            store.save(snapshot(step))
    assert (steps(staging), steps(session.checkpoints_dir)) == ([6, 7], [2, 4, 5, 6, 7])


@pytest.mark.parametrize("code", [errno.ENOTCONN, errno.EIO, errno.ENOSPC, errno.EROFS])
def test_with_staging_a_failing_drive_costs_nothing(
    session: Session, staging: Path, drive: Drive, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    with CheckpointStore(session, keep_last=2, keep_every=2, staging=staging) as store:
        store.save(snapshot(1))
        store.wait()
        drive.code = code
        for step in (2, 3, 4, 5, 6):
            store.save(snapshot(step))
        assert value(store.newest()) == 6
        assert store.stranded == staging / "step-000006"
        assert (steps(session.checkpoints_dir), caplog.messages[0].count(str(staging))) == ([1], 1)
        assert os.strerror(code) in caplog.messages[0]
        assert len(caplog.messages) == 5
        drive.code = 0
        store.save(snapshot(7))
    # The milestones that the Drive missed have followed.
    assert steps(session.checkpoints_dir) == [2, 4, 6, 7]
    assert [value(one) for one in state.find_trained(session)] == [2, 4, 6, 7]


def test_a_copy_that_failed_is_tried_again_at_the_end(
    session: Session, staging: Path, drive: Drive
) -> None:
    drive.code = errno.EIO
    with CheckpointStore(session, staging=staging) as store:
        store.save(snapshot(1, finished=True))
        assert state.latest_trained(session).folder.parent == staging
        drive.code = 0
        store.wait()
        assert store.stranded is None
    assert steps(session.checkpoints_dir) == [1]


@pytest.mark.parametrize("code", [errno.ENOTCONN, errno.ENOSPC])
def test_without_staging_the_machine_keeps_what_the_session_cannot(
    session: Session, staging: Path, drive: Drive, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    with CheckpointStore(session) as store:
        store.save(snapshot(1))
        assert not staging.exists()
        drive.code = code
        saved = store.save(snapshot(2))
        assert (saved.folder, store.stranded) == (staging / "step-000002",) * 2
        [message] = caplog.messages
        assert f"step 2 is saved in {saved.folder} instead" in message
        assert os.strerror(code) in message
        assert value(CheckpointStore(session).newest()) == 2
        assert value(state.latest_trained(session)) == 2
        drive.code = 0
        assert store.save(snapshot(3)).folder.parent == session.checkpoints_dir
        assert store.stranded is None
    assert value(store.newest()) == 3
    assert steps(session.checkpoints_dir) == [1, 3]


def test_the_machine_is_private(session: Session, drive: Drive, staging: Path) -> None:
    drive.code = errno.EIO
    CheckpointStore(session).save(snapshot(1))
    assert staging.stat().st_mode & 0o077 == 0


def test_a_folder_of_another_user_is_not_trusted(
    session: Session, staging: Path, drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    CheckpointStore(session).save(snapshot(1))
    staging.mkdir(parents=True)
    saved_module.write_snapshot(staging, snapshot(9), 10**14)
    assert value(CheckpointStore(session).newest()) == 9
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    monkeypatch.setattr(state, "local_checkpoints_dir", lambda _: staging)
    store = CheckpointStore(session)
    assert value(store.newest()) == 1
    drive.code = errno.EIO
    with pytest.raises(WorkspaceError, match="Operation not permitted"):
        store.save(snapshot(2))


def test_only_when_both_fail_the_run_ends(session: Session, staging: Path) -> None:
    store = CheckpointStore(session, staging=staging)
    store.save(snapshot(1))
    store.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(WorkspaceError, match=r"step 2 could not be saved: .*; nor could it"):
            store.save(snapshot(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert value(store.newest()) == 1
    assert (steps(staging), steps(session.checkpoints_dir)) == ([1], [1])
    store.save(snapshot(2))
    store.close()


def test_what_goes_wrong_in_the_background_is_raised_later(
    session: Session, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(state, "copy_saved", fail)
    store = CheckpointStore(session, staging=staging)
    store.save(snapshot(1))
    with pytest.raises(ZeroDivisionError, match="a mistake of ours"):
        store.save(snapshot(2))
    with pytest.raises(ZeroDivisionError, match="a mistake of ours"):
        store.wait()


def test_closing_does_not_hide_the_error_of_the_block(
    session: Session,
    staging: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(state, "copy_saved", fail)
    with (
        pytest.raises(KeyError, match="theirs"),
        CheckpointStore(session, staging=staging) as store,
    ):
        store.save(snapshot(1))
        raise KeyError("theirs")
    assert "closing the checkpoints failed" in caplog.text
    assert "a mistake of ours" in caplog.text


def test_old_ones_that_cannot_be_removed_do_not_stop_the_run(
    session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))

    monkeypatch.setattr(state, "remove_folder", fail)
    with CheckpointStore(session, keep_last=1) as store:
        store.save(snapshot(1))
        store.save(snapshot(2))
    assert steps(session.checkpoints_dir) == [1, 2]
    assert "old checkpoints are left in" in caplog.text


# Real storage that is full or read-only.


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)  # noqa: S603
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def small_drive(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if sys.platform != "linux":
        pytest.skip("only Linux has tmpfs")
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def big(step: int) -> Snapshot:
    parts = {"unet": {"a": torch.full((100_000,), float(step))}}
    return Snapshot(step=step, finished=False, parts=parts, trained=("unet",))


@pytest.mark.parametrize("staged", [True, False])
def test_a_disk_that_is_really_full_keeps_what_it_has(
    small_drive: Path, caplog: pytest.LogCaptureFixture, staged: bool
) -> None:
    session = Session("robot", small_drive)
    staging = state.local_checkpoints_dir(session)
    with CheckpointStore(session, keep_last=2, staging=staging if staged else None) as store:
        for step in (1, 2, 3):
            store.save(big(step))
            store.wait()
        assert store.stranded == staging / "step-000003"
        assert steps(session.checkpoints_dir) == [1, 2]
        assert "No space left on device" in caplog.text
        newest = store.newest()
        assert newest is not None
        assert newest.load()["unet"]["a"].unique().tolist() == [3]
        for folder in (1, 2):
            saved_module.remove_folder(session.checkpoints_dir / f"step-{folder:06d}")
        store.wait()
        assert store.stranded is None
    assert steps(session.checkpoints_dir) == [3]


def test_a_drive_that_becomes_read_only_costs_nothing(
    small_drive: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = Session("robot", small_drive)
    with CheckpointStore(session) as store:
        store.save(snapshot(1))
        mount("-o", "remount,ro", str(small_drive))
        store.save(snapshot(2))
        assert "Read-only file system" in caplog.text
        assert value(store.newest()) == 2
        mount("-o", "remount,rw", str(small_drive))
        store.save(snapshot(3))
    assert steps(session.checkpoints_dir) == [1, 3]


# Kills.

# Imports once, then forks a saver for each line it reads. With a time the saver saves on and on and
# is killed after it; without, it saves once over a slow copy and leaves as programs do.
SAVER = """
import os, signal, sys, time
from pathlib import Path
from colabtools.dreambooth import state
from colabtools.dreambooth.session import Session
sys.path.insert(0, sys.argv[1])
from meant import meant

def save_on_and_on(store, first):
    for number in range(first, 10**6):
        # Some steps come twice, so that replacing is interrupted as well.
        store.save(meant(number))
        os.write(writer, f"{number} ".encode())

def save_once(store, number):
    copy = state.copy_saved
    state.copy_saved = lambda *arguments: (time.sleep(0.3), copy(*arguments))
    store.save(meant(number))
    os.write(writer, f"{number} ".encode())

for line in sys.stdin:
    folder, staging, first, delay_s = line.strip().split("|")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        session = Session("robot", Path(folder))
        store = state.CheckpointStore(session, staging=Path(staging) if staging else None)
        (save_on_and_on if delay_s else save_once)(store, int(first))
        sys.exit()
    os.close(writer)
    acknowledged = os.read(reader, 100)
    if delay_s:
        time.sleep(float(delay_s))
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reader, 100_000):
        acknowledged += more
    os.close(reader)
    print(acknowledged.split()[-1].decode(), flush=True)
"""
MEANT = """
import torch
from colabtools.dreambooth.state import Snapshot

def meant(number):
    generator = torch.Generator().manual_seed(number)
    def tensor(*shape):
        return torch.randn(shape, generator=generator)
    return Snapshot(
        step=number // 2,
        finished=False,
        parts={"unet": {"a": tensor(300, 300), "b": tensor(7)}, "text_encoder": {"c": tensor(200)}},
        trained=("unet",),
        state={"optimizer": {0: tensor(300, 300), 1: (tensor(7),)}, "number": number, "lr": 0.1},
        description={"number": number},
    )
"""


class Saver:
    """A process that forks others, which save and are killed."""

    def __init__(self, folder: Path) -> None:
        (folder / "meant.py").write_text(MEANT)
        self.process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, *arguments: object) -> int:
        """The number of the last save that had returned when the saver ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("|".join(map(str, arguments)) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def saver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saver]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    saver = Saver(tmp_path_factory.mktemp("saver"))
    with saver.process:
        yield saver
        assert saver.process.stdin is not None
        saver.process.stdin.close()


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_at_most_the_save_under_way(
    session: Session, staging: Path, saver: Saver
) -> None:
    scope: dict[str, Any] = {}
    exec(MEANT, scope)
    meant = scope["meant"]
    chance = random.Random(7)
    places = (session.checkpoints_dir, staging)
    litter, number = 0, 0
    for kill in range(30):
        delay_s = chance.uniform(0, 0.06)
        acknowledged = saver.run(session.folder, staging if kill % 2 else "", number, delay_s)
        litter += sum(name.startswith(".") for place in places for name in names(place))
        found = CheckpointStore(session, staging=staging).newest()
        assert found is not None
        number = found.description["number"]
        assert number in (acknowledged, acknowledged + 1)
        parts, tree, expected = found.load_all(), found.load_state(), meant(number)
        assert parts.keys() == expected.parts.keys()
        assert all(
            parts[part][name].equal(tensor)
            for part, tensors in expected.parts.items()
            for name, tensor in tensors.items()
        )
        assert tree["optimizer"][0].equal(expected.state["optimizer"][0])
        assert tree["optimizer"][1][0].equal(expected.state["optimizer"][1][0])
        assert (tree["number"], tree["lr"]) == (number, 0.1)
    # Else hardly a kill came while something was written, and little was tested.
    assert litter >= 5
    with CheckpointStore(session, staging=staging) as store:
        store.save(meant(number + 1))
    assert [name for place in places for name in names(place) if name.startswith(".")] == []


def test_a_program_that_ends_without_closing_waits_for_the_copy(
    session: Session, staging: Path, saver: Saver
) -> None:
    saver.run(session.folder, staging, 8, "")
    assert steps(session.checkpoints_dir) == [4]
