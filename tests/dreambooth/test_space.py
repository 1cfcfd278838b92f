"""Room in a workspace: all that takes some is named, and what is picked goes, nothing else."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from colabtools.dreambooth.lease import hold
from colabtools.dreambooth.session import create_session, session_names
from colabtools.dreambooth.space import Item, free_items, measure_space
from colabtools.dreambooth.trash import delete_session
from colabtools.drive import Workspace
from colabtools.errors import SessionError, WorkspaceError

FILES = {
    "instance_images/a.png": 1000,
    "captions/a.txt": 10,
    "checkpoints/step-000100/model.safetensors": 3000,
    "checkpoints/step-001000/model.safetensors": 4000,
    "samples/grid.png": 500,
    "class_images/0.png": 600,
    ".cache/latents/a.safetensors": 700,
    "instance_images.old-1/a.png": 800,
    "dog.safetensors": 9000,
}


def fill(workspace: Workspace, name: str) -> Path:
    folder = create_session(workspace, name).folder
    for place, size in FILES.items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path)
    fill(workspace, "dog")
    return workspace


def find(workspace: Workspace, kind: str, name: str = "") -> Item:
    items = [item for item in measure_space(workspace) if item.kind == kind]
    (found,) = [item for item in items if not name or item.path.name == name]
    return found


def files(folder: Path) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return found - {"session.json"}


def test_each_thing_is_measured(workspace: Workspace) -> None:
    sizes = {(i.kind, i.path.name): i.size_bytes for i in measure_space(workspace)}
    record = (workspace.sessions_dir / "dog" / "session.json").stat().st_size
    assert sizes == {
        ("session", "dog"): sum(FILES.values()) + record,
        ("state", "step-000100"): 3000,
        ("state", "step-001000"): 4000,
        ("samples", "samples"): 500,
        ("class pictures", "class_images"): 600,
        ("cache", ".cache"): 700,
        ("kept aside", "instance_images.old-1"): 800,
    }


def test_the_newest_state_is_called_so(workspace: Workspace) -> None:
    lines = [item.line() for item in measure_space(workspace) if item.kind == "state"]
    assert lines == [
        "dog: state step-000100, 3 kB (an older state)",
        "dog: state step-001000, 4 kB (the newest state: training would begin anew)",
    ]


def test_an_empty_workspace_has_nothing_to_free(tmp_path: Path) -> None:
    assert measure_space(Workspace(tmp_path)) == ()


@pytest.mark.parametrize(
    ("kind", "name", "gone"),
    [
        ("state", "step-000100", {"checkpoints/step-000100/model.safetensors"}),
        ("samples", "", {"samples/grid.png"}),
        ("class pictures", "", {"class_images/0.png"}),
        ("cache", "", {".cache/latents/a.safetensors"}),
        ("kept aside", "", {"instance_images.old-1/a.png"}),
    ],
)
def test_what_is_picked_goes_and_nothing_else(
    workspace: Workspace, kind: str, name: str, gone: set[str]
) -> None:
    item = find(workspace, kind, name)
    freed = free_items(workspace, [item, item])
    assert (freed.freed_bytes, freed.trashed_bytes) == (item.size_bytes, 0)
    assert files(workspace.sessions_dir / "dog") == FILES.keys() - gone
    assert not item.path.exists()


def test_a_session_takes_its_parts_along_and_is_in_the_trash(workspace: Workspace) -> None:
    items = [i for i in measure_space(workspace) if i.kind in ("session", "state")]
    freed = free_items(workspace, items)
    assert freed.freed_bytes == 0
    assert freed.trashed_bytes == items[0].size_bytes
    assert "once the trash is emptied" in freed.line()
    assert session_names(workspace) == []
    assert files(next((workspace.sessions_dir / ".trash").iterdir())) == FILES.keys()


def test_the_trash_is_emptied_last(workspace: Workspace) -> None:
    fill(workspace, "old cat")
    delete_session(workspace, "old cat")
    trash = find(workspace, "trash")
    assert trash.size_bytes > 10_000
    dog = find(workspace, "session", "dog")
    freed = free_items(workspace, [trash, dog])
    assert freed.freed_bytes == trash.size_bytes + dog.size_bytes
    assert measure_space(workspace) == ()


def test_what_is_gone_meanwhile_is_not_counted(workspace: Workspace) -> None:
    item = find(workspace, "samples")
    shutil.rmtree(item.path)
    with pytest.raises(SessionError, match="measure again"):
        free_items(workspace, [item])


def test_nothing_outside_the_list_can_be_named(workspace: Workspace) -> None:
    item = find(workspace, "samples")
    folder = workspace.sessions_dir / "dog"
    forged = Item(kind="samples", session="dog", path=folder / "captions", size_bytes=1, note="")
    for wrong in (forged, Item(**{**vars(item), "kind": "cache"})):
        with pytest.raises(SessionError, match="measure again"):
            free_items(workspace, [wrong])
    assert files(folder) == set(FILES)


def test_a_link_is_neither_measured_nor_followed(workspace: Workspace, tmp_path: Path) -> None:
    folder, outside = workspace.sessions_dir / "dog", tmp_path / "outside"
    shutil.rmtree(folder / "samples")
    outside.mkdir()
    (outside / "precious").write_bytes(bytes(10))
    (folder / "samples").symlink_to(outside)
    assert "samples" not in {item.kind for item in measure_space(workspace)}


def test_a_session_that_is_being_written_to_is_left_alone(workspace: Workspace) -> None:
    import threading

    failures: list[Exception] = []
    item = find(workspace, "samples")

    def free() -> None:
        try:
            free_items(workspace, [item])
        except SessionError as error:
            failures.append(error)

    with hold(workspace.sessions_dir / "dog", "train"):
        thread = threading.Thread(target=free)
        thread.start()
        thread.join()
    assert "is being written to" in str(failures[0])
    assert item.path.is_dir()


def test_what_a_kill_left_half_removed_can_be_freed(workspace: Workspace) -> None:
    folder = workspace.sessions_dir / "dog" / "checkpoints"
    (folder / "step-000100").rename(folder / ".leaving-0123abcd")
    item = find(workspace, "kept aside", ".leaving-0123abcd")
    assert free_items(workspace, [item]).freed_bytes == 3000
    assert [path.name for path in folder.iterdir()] == ["step-001000"]


def test_a_storage_that_fails_is_told(flaky: Any) -> None:
    workspace = Workspace(flaky.root)
    fill(workspace, "dog")
    item = find(workspace, "samples")
    with hold(workspace.sessions_dir / "dog", "test"):
        flaky.fail("rename", errno.EIO)
        with pytest.raises(WorkspaceError, match="samples"):
            free_items(workspace, [item])
        flaky.recover()
    assert (item.path / "grid.png").is_file()
