"""Deleting: a move that can be undone, then for good."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from colabtools.dreambooth.lease import hold
from colabtools.dreambooth.session import create_session, open_session, session_names
from colabtools.dreambooth.transfer import import_session
from colabtools.dreambooth.trash import Emptied, delete_session, empty_trash
from colabtools.drive import Workspace
from colabtools.errors import SessionBusyError, SessionError, WorkspaceError


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def make(workspace: Workspace, name: str = "dog") -> Path:
    folder = create_session(workspace, name).folder
    (folder / "instance_images").mkdir()
    (folder / "instance_images" / "a.png").write_bytes(bytes(5000))
    return folder


def test_a_deleted_session_is_in_the_trash_whole_and_its_room_is_told(workspace: Workspace) -> None:
    folder = make(workspace)
    size = 5000 + (folder / "session.json").stat().st_size
    deleted = delete_session(workspace, "dog")
    assert deleted.size_bytes == size
    assert deleted.place.parent == workspace.sessions_dir / ".trash"
    assert (deleted.place / "instance_images" / "a.png").stat().st_size == 5000
    assert session_names(workspace) == []
    with pytest.raises(SessionError, match="there are none"):
        open_session(workspace, "dog")
    assert [path.name for path in workspace.sessions_dir.iterdir()] == [".trash"]


def test_it_can_be_brought_back(workspace: Workspace) -> None:
    make(workspace)
    place = delete_session(workspace, "dog").place
    assert import_session(workspace, place, name="dog").session == open_session(workspace, "dog")


def test_two_of_one_name_stand_side_by_side_in_the_trash(workspace: Workspace) -> None:
    places = set()
    for _ in range(3):
        make(workspace)
        places.add(delete_session(workspace, "dog").place)
    assert len(places) == 3
    assert all((place / "session.json").is_file() for place in places)


def test_emptying_is_for_good_and_touches_nothing_else(workspace: Workspace) -> None:
    make(workspace, "cat")
    make(workspace)
    size = delete_session(workspace, "dog").size_bytes
    assert empty_trash(workspace) == Emptied(sessions=1, size_bytes=size)
    assert [path.name for path in workspace.sessions_dir.iterdir()] == ["cat"]
    assert empty_trash(workspace) == Emptied(sessions=0, size_bytes=0)


def test_a_link_in_the_trash_is_removed_and_not_followed(
    workspace: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").touch()
    folder = make(workspace)
    (folder / "linked").symlink_to(tmp_path / "mine")
    place = delete_session(workspace, "dog").place
    (place.parent / "another").symlink_to(tmp_path / "mine")
    empty_trash(workspace)
    assert (tmp_path / "mine" / "photo.png").exists()
    assert not place.parent.exists()


def test_what_killed_imports_left_goes_but_not_that_of_one_under_way(workspace: Workspace) -> None:
    for name in ("dead", "alive"):
        (workspace.sessions_dir / ".incoming" / name).mkdir(parents=True)
        (workspace.sessions_dir / ".incoming" / name / "a").write_bytes(b"123")
    said: list[Emptied] = []
    with hold(workspace.sessions_dir / "alive", "import"):
        thread = threading.Thread(target=lambda: said.append(empty_trash(workspace)))
        thread.start()
        thread.join()
    assert said == [Emptied(sessions=0, size_bytes=3)]
    left = (workspace.sessions_dir / ".incoming").iterdir()
    assert [path.name for path in left] == ["alive"]


def test_a_session_with_a_damaged_record_can_be_deleted(workspace: Workspace) -> None:
    (make(workspace) / "session.json").write_text("{")
    assert delete_session(workspace, "dog").place.is_dir()


@pytest.mark.parametrize("name", ["dog", "../dog", ".trash", "", "."])
def test_what_is_no_session_is_not_deleted(workspace: Workspace, name: str) -> None:
    make(workspace, "cat")
    (workspace.sessions_dir / ".trash").mkdir()
    (workspace.sessions_dir.parent / "dog").mkdir()
    with pytest.raises(SessionError):
        delete_session(workspace, name)
    assert (workspace.sessions_dir.parent / "dog").is_dir()
    assert session_names(workspace) == ["cat"]


@pytest.mark.parametrize("number", [5, 107, 13])
@pytest.mark.parametrize("call", ["rename", "list"])
def test_a_drive_that_fails_leaves_the_session_where_it_was(
    flaky: Any, number: int, call: str
) -> None:
    workspace = Workspace(flaky.root)
    folder = make(workspace)
    flaky.fail(call, number)
    with pytest.raises(WorkspaceError, match=f"errno {number}"):
        delete_session(workspace, "dog")
    flaky.recover()
    assert (folder / "instance_images" / "a.png").is_file()
    assert delete_session(workspace, "dog").place.is_dir()


def test_a_trash_that_cannot_be_emptied_is_told(flaky: Any) -> None:
    workspace = Workspace(flaky.root)
    make(workspace)
    delete_session(workspace, "dog")
    flaky.fail("list", 107, first=2)
    with pytest.raises(WorkspaceError, match="cannot remove"):
        empty_trash(workspace)
    flaky.recover()
    assert empty_trash(workspace).sessions == 1


def test_a_session_that_another_writes_to_is_not_deleted(workspace: Workspace) -> None:
    folder = make(workspace)
    said: list[SessionBusyError] = []

    def attempt() -> None:
        try:
            delete_session(workspace, "dog")
        except SessionBusyError as error:
            said.append(error)

    with hold(folder, "train"):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert len(said) == 1
    assert (folder / "session.json").is_file()
