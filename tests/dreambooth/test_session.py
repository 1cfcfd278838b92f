"""Sessions: names that are folders everywhere, and a record that outlives what befalls it."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import unicodedata
import zipfile
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from colabtools.dreambooth.claims import Holder, claim_bytes, claims_dir, find_holders
from colabtools.dreambooth.config import PrepareConfig
from colabtools.dreambooth.dataset import prepare
from colabtools.dreambooth.lease import hold
from colabtools.dreambooth.session import (
    SCHEMA_VERSION,
    Session,
    create_session,
    now_text,
    open_session,
    release_session,
    session_names,
)
from colabtools.drive import Workspace
from colabtools.errors import SessionBusyError, SessionError, WorkspaceError

BAD_NAMES = [
    *("", " ", ".", "..", "/", "a/b", "/etc", "../up", "a/../b", "a..b", "a\\b", "C:"),
    *(".hidden", "-x", "_x", " x", "+x", "x.", "x ", "x*", "x?", 'x"', "x<", "x|", "~", "$HOME"),
    *("a\nb", "a\tb", "a\0b", "a\u200bb", "a\ud800b", "🐕", "x" * 65, "𝒜" * 60),
]
GOOD_NAMES = [
    *("a", "7", "my-dog", "my dog", "Dog_2.1", "a+b", "x" * 64, "chien été", "Жучка", "犬" * 64),
    *("बिल्ली", "กระเป๋า", "ёлка 2"),
]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("find", [create_session, open_session])
def test_a_name_that_cannot_be_a_folder_is_refused_and_nothing_made(
    workspace: Workspace, find, name: str
) -> None:
    with pytest.raises(SessionError, match="cannot be a folder; use up to 64 letters") as why:
        find(workspace, name)
    assert "\n" not in str(why.value)
    assert list(workspace.root.iterdir()) == []


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_name_in_any_script_is_a_folder_directly_inside_the_sessions(
    workspace: Workspace, name: str
) -> None:
    session = create_session(workspace, name)
    assert session.folder.is_dir()
    assert session.folder.parent == workspace.root / "Fast-Dreambooth" / "Sessions"
    assert session.name == session.folder.name == unicodedata.normalize("NFC", name)
    assert open_session(workspace, name) == session
    # What export will call its files has to fit as well.
    (session.folder / f"{session.name}_step_100000.safetensors").touch()


def test_two_spellings_of_a_letter_are_one_session(workspace: Workspace) -> None:
    composed, decomposed = "\u00e9t\u00e9", "e\u0301te\u0301"
    assert create_session(workspace, composed) == create_session(workspace, decomposed)
    assert len(list(workspace.sessions_dir.iterdir())) == 1


def test_the_folders_are_those_that_existing_users_have(workspace: Workspace) -> None:
    session = create_session(workspace, "dog")
    names = {
        *(session.instance_images_dir, session.captions_dir, session.class_images_dir),
        *(session.checkpoints_dir, session.samples_dir, session.logs_dir, session.record_path),
    }
    assert {path.relative_to(session.folder).as_posix() for path in names} == {
        *("instance_images", "captions", "class_images", "checkpoints", "samples", "logs"),
        "session.json",
    }


def test_the_record_survives_being_created_and_opened_again(workspace: Workspace) -> None:
    session = create_session(workspace, "dog")
    created = session.read_record()["created"]
    session.update_record(base_model="micro")
    session.add_run({"verb": "train", "step": 7})
    session.add_run({"verb": "export"})
    create_session(workspace, "dog")
    record = open_session(workspace, "dog").read_record()
    assert (record["created"], record["base_model"], record["name"]) == (created, "micro", "dog")
    assert [run["verb"] for run in record["runs"]] == ["train", "export"]
    assert all(datetime.fromisoformat(run["time"]) for run in record["runs"])
    assert record["schema_version"] == SCHEMA_VERSION == 1


def test_an_update_that_changes_nothing_does_not_touch_the_file(workspace: Workspace) -> None:
    session = create_session(workspace, "dog")
    session.update_record(base_model="micro", resolution=64)
    os.utime(session.record_path, (1, 1))
    session.update_record(resolution=64)
    assert session.record_path.stat().st_mtime == 1
    session.update_record(resolution=512)
    assert session.record_path.stat().st_mtime > 1
    assert session.read_record()["base_model"] == "micro"


def test_letters_of_any_script_stay_readable_in_the_record(workspace: Workspace) -> None:
    session = create_session(workspace, "犬")
    session.add_run({"prompt": "фото"})
    text = session.record_path.read_text(encoding="utf-8")
    assert "犬" in text
    assert "фото" in text


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"3", b"null", b'"x"', b"[" * 100_000],
    ids=["empty", "cut", "bytes", "list", "number", "null", "text", "deep"],
)
@pytest.mark.parametrize("find", [create_session, open_session])
def test_a_damaged_record_is_found_before_any_work_and_kept(
    workspace: Workspace, find, content: bytes
) -> None:
    path = create_session(workspace, "dog").record_path
    path.write_bytes(content)
    with pytest.raises(SessionError, match=r"session\.json is damaged .*rename it") as why:
        find(workspace, "dog")
    assert "\n" not in str(why.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize("runs", [None, "none", {"verb": "train"}])
def test_a_record_without_a_list_of_runs_is_damaged(workspace: Workspace, runs: object) -> None:
    path = create_session(workspace, "dog").record_path
    path.write_text(json.dumps({"schema_version": 1, "runs": runs}))
    with pytest.raises(SessionError, match="damaged"):
        open_session(workspace, "dog")


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_a_record_of_another_version_is_refused(workspace: Workspace, version: object) -> None:
    path = create_session(workspace, "dog").record_path
    path.write_text(json.dumps({"schema_version": version, "runs": []}))
    with pytest.raises(SessionError, match=rf"schema version {version!r}, .* update colabtools"):
        open_session(workspace, "dog")


def test_a_session_whose_record_was_renamed_works_without_it(workspace: Workspace) -> None:
    session = create_session(workspace, "dog")
    session.record_path.rename(session.folder / "session.old")
    reopened = open_session(workspace, "dog")
    reopened.add_run({"verb": "train"})
    assert [run["verb"] for run in reopened.read_record()["runs"]] == ["train"]


def test_a_session_of_the_established_notebook_opens_without_a_record(workspace: Workspace) -> None:
    (workspace.sessions_dir / "old" / "instance_images").mkdir(parents=True)
    assert open_session(workspace, "old").read_record()["runs"] == []
    assert [path.name for path in (workspace.sessions_dir / "old").iterdir()] == ["instance_images"]


def test_a_session_that_is_not_there_is_told_with_those_that_are(workspace: Workspace) -> None:
    with pytest.raises(SessionError, match="no session 'dog' in .*; there are none, run prepare"):
        open_session(workspace, "dog")
    for name in ("cat", "ant"):
        create_session(workspace, name)
    (workspace.sessions_dir / ".trash").mkdir()
    (workspace.sessions_dir / "dog").touch()
    with pytest.raises(SessionError, match="there is ant, cat, run prepare first"):
        open_session(workspace, "dog")


def test_a_file_where_the_session_should_be_is_refused_and_kept(workspace: Workspace) -> None:
    workspace.sessions_dir.mkdir(parents=True)
    (workspace.sessions_dir / "dog").write_text("mine")
    with pytest.raises(WorkspaceError, match="a file stands where a folder is needed"):
        create_session(workspace, "dog")
    assert (workspace.sessions_dir / "dog").read_text() == "mine"


def test_a_disk_that_fills_leaves_no_empty_session(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkspaceError, match="No space left"):
        create_session(workspace, "dog")
    assert list(workspace.sessions_dir.iterdir()) == []


def test_a_record_on_a_drive_that_dropped_is_not_called_damaged(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_session(workspace, "dog")

    def dropped(*args: object, **kwargs: object) -> str:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    monkeypatch.setattr(Path, "read_text", dropped)
    with pytest.raises(WorkspaceError, match="mount it again"):
        open_session(workspace, "dog")


def test_the_time_is_utc_to_the_second() -> None:
    time = datetime.fromisoformat(now_text())
    assert time.utcoffset() == timedelta(0)
    assert time.microsecond == 0
    assert abs(datetime.now(timezone.utc) - time) < timedelta(minutes=1)


def test_a_session_is_a_value() -> None:
    assert Session("a", Path("x")) == Session("a", Path("x"))


@pytest.mark.parametrize("name", ["Rex & me!", "(dog)", "_x", "my dog ", "e\u0301te\u0301"])
def test_an_older_session_opens_under_the_name_that_it_has(workspace: Workspace, name: str) -> None:
    (workspace.sessions_dir / name / "instance_images").mkdir(parents=True)
    session = open_session(workspace, name)
    assert session.folder == workspace.sessions_dir / name
    session.add_run({"verb": "train"})
    assert open_session(workspace, unicodedata.normalize("NFC", name)) == session
    assert create_session(workspace, name) == session
    assert session_names(workspace) == [name]


def test_a_refused_name_comes_with_one_that_can_be(workspace: Workspace) -> None:
    with pytest.raises(SessionError, match="such as 'my-dog'"):
        create_session(workspace, "my/dog")


@pytest.mark.parametrize("name", ["..", ".", ".trash", "a/b", "dog/../../x"])
def test_a_name_that_leads_elsewhere_opens_nothing_even_if_it_is_there(
    workspace: Workspace, name: str
) -> None:
    for place in ("a/b", ".trash", "dog"):
        (workspace.sessions_dir / place).mkdir(parents=True)
    with pytest.raises(SessionError, match="cannot be a folder"):
        open_session(workspace, name)


def test_writing_is_told_to_others_and_readers_do_not_care(workspace: Workspace) -> None:
    session = create_session(workspace, "dog")
    said: list[str] = []

    def attempt() -> None:
        assert open_session(workspace, "dog") == session
        session.read_record()
        try:
            with session.writing("train"):
                said.append("held")
        except SessionBusyError as error:
            said.append(str(error))

    with session.writing("prepare"):
        session.add_run({"verb": "prepare"})
        assert [holder.verb for holder in find_holders(session.folder)] == ["prepare"]
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert len(said) == 1
    assert said[0].startswith("session 'dog' is being written to by")
    attempt()
    assert said[1] == "held"


def test_a_process_that_only_helps_holds_nothing(workspace: Workspace) -> None:
    session = create_session(workspace, "dog")
    with session.writing("train", lead=False):
        assert find_holders(session.folder) == ()


def test_the_zips_of_an_older_notebook_are_unpacked_for_the_first_writer(
    workspace: Workspace,
) -> None:
    folder = workspace.sessions_dir / "old"
    folder.mkdir(parents=True)
    for name, file in (("instance_images", "a.png"), ("captions", "a.txt")):
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            archive.writestr(f"{name}/{file}", "x")
    session = open_session(workspace, "old")
    assert not session.instance_images_dir.exists()
    with session.writing("train"):
        assert (session.instance_images_dir / "a.png").read_text() == "x"
        assert (session.captions_dir / "a.txt").read_text() == "x"
    assert (folder / "captions.zip").is_file()


def test_what_a_kill_left_long_ago_goes_and_a_write_under_way_stays(workspace: Workspace) -> None:
    session = create_session(workspace, "dog")
    old = session.folder / ".session.json-0123abcd.part"
    new = session.folder / ".session.json-89abcdef.part"
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    with session.writing("train"):
        pass
    assert sorted(p.name for p in session.folder.iterdir()) == [new.name, "session.json"]


def test_a_record_is_not_written_by_one_who_was_taken_over(workspace: Workspace) -> None:
    session = create_session(workspace, "dog")
    before = session.record_path.read_bytes()
    with hold(session.folder, "train") as lease:
        lease.lost = "it was taken over"
        with pytest.raises(SessionBusyError, match="not this runtime's any more"):
            session.add_run({"verb": "train"})
    assert session.record_path.read_bytes() == before


def test_a_session_is_released_from_a_runtime_that_is_gone(workspace: Workspace) -> None:
    session = create_session(workspace, "dog")
    there = Holder(
        token="0", verb="train", machine="?", host="colab-2", pid=7, started=0.0, since="then"
    )
    claims_dir(session.folder).mkdir(parents=True)
    (claims_dir(session.folder) / "0.json").write_bytes(claim_bytes(there))
    assert [holder.host for holder in find_holders(session.folder)] == ["colab-2"]
    assert release_session(workspace, "dog") == session
    assert find_holders(session.folder) == ()


def test_photos_are_not_prepared_into_a_session_that_another_writes_to(
    workspace: Workspace,
) -> None:
    session = create_session(workspace, "dog")
    said: list[SessionBusyError] = []

    def attempt() -> None:
        try:
            prepare(workspace, "dog", PrepareConfig(images="demo"))
        except SessionBusyError as error:
            said.append(error)

    with session.writing("train"):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert len(said) == 1
    assert [path.name for path in session.folder.iterdir()] == ["session.json"]


@pytest.mark.parametrize("call", ["read", "write", "list"])
def test_a_drive_that_stumbles_once_is_asked_again(flaky: Any, call: str) -> None:
    workspace = Workspace(flaky.root)
    session = create_session(workspace, "dog")
    flaky.fail(call, errno.EIO, times=1)
    with session.writing("train"):
        session.add_run({"verb": "train"})
    assert [run["verb"] for run in session.read_record()["runs"]] == ["train"]
    assert flaky.slept
