"""One writer for a session: on one machine, after kills, and across machines on a lagging Drive."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from colabtools.dreambooth import lease as lease_module
from colabtools.dreambooth.claims import Holder, find_holders, machine_id
from colabtools.dreambooth.lease import Timing, ensure_held, hold
from colabtools.errors import SessionBusyError, WorkspaceError

QUICK = Timing(beat_s=0.03, still_s=0.6, settle_s=0.05, poll_s=0.02)
PATIENT = replace(QUICK, beat_s=60, still_s=60)

CHILD = """
import sys, time
from pathlib import Path
from colabtools.dreambooth.lease import hold
with hold(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a session, in a workspace that holds nothing else."""
    folder = tmp_path / "Fast-Dreambooth" / "Sessions" / "dog"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def child(folder: Path) -> Any:
    """Another process of this machine, writing to the session."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def elsewhere(folder: Path, token: str = "0", **values: Any) -> Path:
    """The claim of a runtime on another machine."""
    holder = Holder(
        **{
            "token": token,
            "verb": "train",
            "machine": "another",
            "host": "colab-2",
            "pid": 7,
            "started": 1.0,
            "since": "then",
            "beat": 3,
            **values,
        }
    )
    path = folder.parent / ".leases" / folder.name / f"{holder.token}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(holder)))
    return path


def beating(path: Path, stop: threading.Event) -> threading.Thread:
    """Keep a claim changing, as its runtime would."""

    def beat() -> None:
        holder = json.loads(path.read_text())
        while not stop.wait(0.02):
            holder["beat"] += 1
            path.write_text(json.dumps(holder))

    thread = threading.Thread(target=beat)
    thread.start()
    return thread


def wait_until(true: Callable[[], Any]) -> None:
    end_s = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_lease_is_seen_while_it_is_held_and_leaves_nothing(folder: Path) -> None:
    with hold(folder, "train"):
        (holder,) = find_holders(folder)
        assert (holder.verb, holder.pid, holder.alive) == ("train", os.getpid(), True)
        assert str(holder).startswith(f"train on this machine, process {os.getpid()}, since 20")
    assert find_holders(folder) == ()
    assert list(folder.parent.iterdir()) == [folder]


def test_a_session_that_is_not_there_yet_can_be_held(tmp_path: Path) -> None:
    with hold(tmp_path / "Fast-Dreambooth" / "Sessions" / "new", "import"):
        pass
    assert list((tmp_path / "Fast-Dreambooth" / "Sessions").iterdir()) == []


def test_a_workspace_that_is_gone_is_not_made_up(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="still mounted"), hold(tmp_path / "a/b/c/d", "train"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_block_inside_another_shares_its_lease(folder: Path) -> None:
    with hold(folder, "train") as outer:
        with hold(folder, "prepare") as inner:
            assert inner is outer
        assert len(find_holders(folder)) == 1
    assert find_holders(folder) == ()


def test_another_thread_is_refused(folder: Path) -> None:
    said: list[str] = []

    def attempt() -> None:
        try:
            with hold(folder, "prepare"):
                said.append("held")
        except SessionBusyError as error:
            said.append(str(error))

    with hold(folder, "train"):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert len(said) == 1
    assert "another thread of this process" in said[0]


def test_another_process_is_refused_at_once_and_told_which(folder: Path, child: Any) -> None:
    start_s = time.monotonic()
    with (
        pytest.raises(SessionBusyError, match=f"train on this machine, process {child.pid}") as why,
        hold(folder, "train"),
    ):
        pass
    assert time.monotonic() - start_s < 1
    assert "session release 'dog'" in str(why.value)
    assert "\n" not in str(why.value)
    assert [holder.pid for holder in find_holders(folder)] == [child.pid]


def test_a_live_process_of_this_machine_is_not_taken_over(folder: Path, child: Any) -> None:
    with pytest.raises(SessionBusyError), hold(folder, "train", take_over=True):
        pass


def test_a_process_that_hides_its_lock_is_found_by_its_claim(
    folder: Path, child: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "another"))
    with pytest.raises(SessionBusyError, match=f"process {child.pid}"), hold(folder, "train"):
        pass


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_after_a_kill_the_next_one_goes_on_at_once(folder: Path, child: Any, reaped: bool) -> None:
    os.kill(child.pid, signal.SIGKILL)
    if reaped:
        child.wait()
    else:
        wait_until(lambda: find_holders(folder) == ())
    start_s = time.monotonic()
    with hold(folder, "train", timing=PATIENT):
        assert time.monotonic() - start_s < 1
        assert [holder.pid for holder in find_holders(folder)] == [os.getpid()]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_kill_before_the_claim_was_written_costs_no_wait(folder: Path, child: Any) -> None:
    (holder,) = find_holders(folder)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    (folder.parent / ".leases" / "dog" / f"{holder.token}.json").write_bytes(b"")
    start_s = time.monotonic()
    with hold(folder, "train", timing=PATIENT):
        assert time.monotonic() - start_s < 1


def test_a_process_number_given_anew_is_another_process(folder: Path) -> None:
    machine = machine_id()
    elsewhere(folder, machine=machine, pid=os.getpid(), started=12.0)
    assert find_holders(folder) == ()
    with hold(folder, "train", timing=PATIENT):
        pass


def test_a_runtime_that_beats_elsewhere_is_found_out_and_kept(folder: Path) -> None:
    path, stop = elsewhere(folder), threading.Event()
    thread = beating(path, stop)
    with (
        pytest.raises(SessionBusyError, match="train on colab-2, process 7, since then"),
        hold(folder, "train", timing=QUICK),
    ):
        pass
    stop.set()
    thread.join()
    assert path.is_file()
    assert [holder.alive for holder in find_holders(folder)] == [None]


def test_a_claim_that_stands_still_is_outlived(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = elsewhere(folder)
    start_s = time.monotonic()
    with hold(folder, "train", timing=QUICK) as lease:
        assert QUICK.still_s <= time.monotonic() - start_s < 3
        assert not path.exists()
        assert lease.claim.taken == ("0",)
    assert "watching for 1 s whether that runtime lives" in caplog.text
    assert "colab-2" in caplog.text


def test_an_explicit_taking_over_does_not_watch(folder: Path) -> None:
    path = elsewhere(folder)
    start_s = time.monotonic()
    with hold(folder, "release", take_over=True, timing=PATIENT):
        assert time.monotonic() - start_s < 1
        assert not path.exists()


def test_a_claim_that_goes_while_it_is_watched_costs_no_more_time(folder: Path) -> None:
    path = elsewhere(folder)
    threading.Timer(0.1, path.unlink).start()
    start_s = time.monotonic()
    with hold(folder, "train", timing=replace(QUICK, still_s=30)):
        assert time.monotonic() - start_s < 3


@pytest.mark.parametrize("how", ["removed", "told"])
def test_who_was_taken_over_is_interrupted_and_writes_no_more(folder: Path, how: str) -> None:
    with (
        pytest.raises(SessionBusyError, match="not this runtime's any more") as why,
        hold(folder, "train", timing=QUICK) as lease,
    ):
        ensure_held(folder)
        if how == "told":
            elsewhere(folder, token="zz", taken=[lease.claim.token])
        else:
            (folder.parent / ".leases" / "dog" / f"{lease.claim.token}.json").unlink()
        with pytest.raises(KeyboardInterrupt):
            wait_until(lambda: False)
        with pytest.raises(SessionBusyError, match="nothing more was written"):
            ensure_held(folder)
        raise KeyboardInterrupt
    assert isinstance(why.value.__cause__, KeyboardInterrupt)
    ensure_held(folder)


@pytest.mark.parametrize(
    ("token", "beat", "stays"), [("0", 3, False), ("0", 0, True), ("zz", 3, True)]
)
def test_of_two_that_never_saw_each_other_one_stays(
    folder: Path, token: str, beat: int, stays: bool
) -> None:
    with hold(folder, "train", timing=PATIENT) as lease:
        elsewhere(folder, token=token, beat=beat)
        lease.beat()
        assert (lease.lost == "") is stays


@pytest.mark.parametrize(
    ("token", "beat", "stays"), [("0", 0, False), ("zz", 0, True), ("zz", 1, False)]
)
def test_of_two_that_came_together_on_drive_one_stays(
    flaky: Any, monkeypatch: pytest.MonkeyPatch, token: str, beat: int, stays: bool
) -> None:
    folder = flaky.root / "Fast-Dreambooth" / "Sessions" / "dog"
    folder.mkdir(parents=True)
    slept: list[float] = []

    def appear(seconds: float) -> None:
        slept.append(seconds)
        elsewhere(folder, token=token, beat=beat)

    monkeypatch.setattr(lease_module.time, "sleep", appear)
    try:
        with hold(folder, "train", timing=PATIENT) as lease:
            assert lease.claim.beat == 1
            assert lease.lost == ""
            held = True
    except SessionBusyError:
        held = False
    assert slept == [PATIENT.settle_s]
    assert held is stays
    assert [holder.host for holder in find_holders(folder)] == ["colab-2"]


def test_on_this_machines_disk_nothing_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module.time, "sleep", None)
    with hold(folder, "train"):
        pass


def test_the_claim_beats_in_place(folder: Path) -> None:
    with hold(folder, "train", timing=QUICK) as lease:
        (path,) = (folder.parent / ".leases" / "dog").iterdir()
        node = path.stat().st_ino
        wait_until(lambda: lease.claim.beat > 2)
        assert path.stat().st_ino == node
        assert json.loads(path.read_text())["beat"] >= 2


def test_a_drive_that_drops_is_no_taking_over(folder: Path) -> None:
    with hold(folder, "train", timing=PATIENT) as lease:
        folder.parent.rename(folder.parent.with_name("gone"))
        lease.beat()
        assert lease.lost == ""
        folder.parent.with_name("gone").rename(folder.parent)
        lease.beat()
        assert lease.lost == ""
        assert lease.claim.beat >= 1


def test_beats_that_fail_are_tried_again(flaky: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = flaky.root / "Fast-Dreambooth" / "Sessions" / "dog"
    folder.mkdir(parents=True)
    with hold(folder, "train", timing=QUICK) as lease:
        flaky.fail("write", errno.ENOTCONN)
        wait_until(lambda: flaky.calls["write"] > 2)
        flaky.recover()
        beat = lease.claim.beat
        wait_until(lambda: lease.claim.beat > beat + 1)
        assert lease.lost == ""
        assert [holder.beat for holder in find_holders(folder)] != [0]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ENOTCONN, errno.EACCES])
def test_a_claim_that_cannot_be_written_is_a_typed_error(flaky: Any, number: int) -> None:
    folder = flaky.root / "Fast-Dreambooth" / "Sessions" / "dog"
    folder.mkdir(parents=True)
    flaky.fail("write", number)
    with (
        pytest.raises(WorkspaceError, match="cannot claim the session") as why,
        hold(folder, "train"),
    ):
        pass
    assert why.value.errno == number
    flaky.recover()
    assert list(folder.parent.iterdir()) == [folder]


def test_many_sessions_are_held_and_let_go_at_once(folder: Path) -> None:
    def work(name: str) -> None:
        try:
            for _ in range(60):
                with hold(folder.with_name(name), "train"):
                    pass
        except WorkspaceError as error:
            failures.append(error)

    failures: list[WorkspaceError] = []
    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(folder.parent.iterdir()) == [folder]


# A runtime of its own: another machine, another temporary folder, a folder behind a network.
RUNTIME = """
import json, random, sys, time
from pathlib import Path
from colabtools.dreambooth import claims, lease
from colabtools.errors import SessionBusyError
folder, who, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
claims.machine_id = lease.machine_id = lambda: who
lease.is_remote = lambda path: True
timing = lease.Timing(beat_s=0.05, still_s=1.0, settle_s=0.1, poll_s=0.02)
chance, held = random.Random(seed), []
end_s = time.monotonic() + 4
while time.monotonic() < end_s:
    try:
        with lease.hold(folder, "train", timing=timing):
            start_s = time.monotonic()
            time.sleep(chance.uniform(0.01, 0.1))
            held.append((start_s, time.monotonic()))
    except (SessionBusyError, KeyboardInterrupt):
        pass
    time.sleep(chance.uniform(0, 0.05))
print(json.dumps(held))
"""


@pytest.mark.slow
def test_three_machines_that_race_never_write_at_once(folder: Path, tmp_path: Path) -> None:
    children = []
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        command = [sys.executable, "-c", RUNTIME, str(folder), f"machine {number}", str(number)]
        environment = {**os.environ, "TMPDIR": str(tmp_path / str(number))}
        children.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        )
    held = [span for child in children for span in json.loads(child.communicate()[0])]
    assert len(held) > 5
    held.sort()
    overlaps = [(a, b) for a, b in zip(held, held[1:], strict=False) if b[0] < a[1]]
    assert overlaps == []
    assert find_holders(folder) == ()
