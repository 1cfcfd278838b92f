"""Sessions in and out, all or nothing: ours, those of the established notebook, and mere photos."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from colabtools.dreambooth.archive import Bounds
from colabtools.dreambooth.lease import hold
from colabtools.dreambooth.session import Session, create_session, open_session
from colabtools.dreambooth.shelf import show_session
from colabtools.dreambooth.transfer import export_session, import_session
from colabtools.drive import Workspace
from colabtools.errors import SessionBusyError, SessionError, StorageFullError, WorkspaceError


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "work").mkdir()
    return Workspace(tmp_path / "work")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is not hidden, by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in found.items() if "/." not in f"/{name}"}


def picture(path: Path, size: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), "red").save(path)


def make_session(workspace: Workspace, name: str = "dog") -> Session:
    session = create_session(workspace, name)
    for stem in ("a", "b (1)", "ü 🐕"):
        picture(session.instance_images_dir / f"{stem}.png")
        session.captions_dir.mkdir(exist_ok=True)
        (session.captions_dir / f"{stem}.txt").write_text(f"a sks {stem}\n", encoding="utf-8")
    (session.folder / ".cache").mkdir()
    (session.folder / ".cache" / "latents").write_bytes(b"made anew")
    (session.checkpoints_dir / "step-000007").mkdir(parents=True)
    (session.checkpoints_dir / "step-000007" / "unet.safetensors").write_bytes(bytes(3_000_000))
    (session.folder / f"{name}.safetensors").write_bytes(b"weights")
    session.add_run({"verb": "train", "step": 7})
    return session


def old_session(folder: Path, name: str) -> Path:
    """A session as the established notebook leaves it."""
    picture(folder / "instance_images" / "rex (1).jpg")
    (folder / "captions").mkdir()
    (folder / "captions" / "rex (1).txt").write_text("rex on a chair")
    for model in (f"{name}.ckpt", f"{name}_step_500.ckpt"):
        (folder / model).write_bytes(f"pickle of {model}".encode())
    return folder


def zipped(folder: Path, target: Path) -> Path:
    return Path(shutil.make_archive(str(target.with_suffix("")), "zip", folder))


def leftovers(workspace: Workspace) -> list[str]:
    """What is in the workspace beside sessions."""
    hidden = workspace.sessions_dir.glob(".*")
    return [*(path.name for path in hidden), *(p.name for p in workspace.root.glob(".*"))]


def test_a_session_comes_back_from_its_zip_to_the_byte(
    workspace: Workspace, tmp_path: Path
) -> None:
    session = make_session(workspace)
    before = contents(session.folder)
    exported = export_session(workspace, "dog")
    assert exported.path == workspace.root / "dog.zip"
    assert exported.files == len(before) == 9
    other = Workspace(tmp_path / "other")
    other.root.mkdir()
    imported = import_session(other, exported.path)
    assert contents(imported.session.folder) == before
    assert (imported.asked, imported.session.name, imported.left_out) == ("dog", "dog", ())
    assert imported.size_bytes == exported.size_bytes == sum(map(len, before.values()))
    assert open_session(other, "dog").read_record()["runs"][0]["step"] == 7
    assert leftovers(workspace) == leftovers(other) == []


def test_the_same_session_makes_the_same_zip(workspace: Workspace, tmp_path: Path) -> None:
    session = make_session(workspace)
    one = export_session(workspace, "dog", tmp_path / "one.zip").path
    copy = session.folder.with_name("copy")
    shutil.copytree(session.folder, copy)
    shutil.rmtree(session.folder)
    copy.rename(session.folder)
    two = export_session(workspace, "dog", tmp_path / "two.zip").path
    assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(two.read_bytes()).digest()
    infos = zipfile.ZipFile(one).infolist()
    assert {(info.compress_type, info.external_attr >> 16) for info in infos} == {(0, 0o100644)}
    assert [info.filename for info in infos] == sorted(info.filename for info in infos)


def test_a_folder_is_imported_and_only_read(workspace: Workspace, tmp_path: Path) -> None:
    session = make_session(workspace)
    before = contents(session.folder)
    imported = import_session(workspace, session.folder, name="cat")
    assert contents(session.folder) == before
    record = imported.session.read_record()
    assert (record["name"], record["runs"]) == ("cat", session.read_record()["runs"])
    after = contents(imported.session.folder)
    assert after.keys() ^ before.keys() == {"dog.safetensors", "cat.safetensors"}
    assert after["cat.safetensors"] == before["dog.safetensors"]


@pytest.mark.parametrize("wrapped", ["", "Rex!", "MyDrive/Fast-Dreambooth/Sessions/Rex!"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_session_of_the_established_notebook_is_imported(
    workspace: Workspace, tmp_path: Path, kind: str, wrapped: str
) -> None:
    outer = tmp_path / "Rex!"
    inner = old_session(outer / wrapped, "Rex!")
    source = zipped(outer, tmp_path / "Rex!.zip") if kind == "zip" else outer
    imported = import_session(workspace, source)
    assert (imported.asked, imported.session.name) == ("Rex!", "Rex")
    renamed = {name.replace("Rex!", "Rex"): data for name, data in contents(inner).items()}
    assert contents(imported.session.folder) == renamed
    assert "Rex_step_500.ckpt" in renamed
    shown = show_session(workspace, "Rex")
    assert (shown.pictures, shown.captions, shown.models) == (
        *(1, 1),
        ("Rex.ckpt", "Rex_step_500.ckpt"),
    )


def test_the_rule_is_shown_when_a_name_is_cleaned(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import_session(workspace, old_session(tmp_path / "x", "x"), name="my/dog")
    assert "called 'my-dog', since 'my/dog' cannot be a folder: use up to 64" in caplog.text


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_photos_with_captions_beside_them_become_a_session(
    workspace: Workspace, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "shared" / "Rex"
    picture(folder / "1.JPG")
    picture(folder / "2.png")
    (folder / "1.txt").write_text("one")
    (folder / "2.caption").write_text("two")
    (folder / "readme.txt").write_text("no caption")
    picture(folder / "more" / "3.png")
    source = zipped(folder.parent, tmp_path / "download.zip") if kind == "zip" else folder
    imported = import_session(workspace, source)
    assert imported.session.name == "Rex"
    names = {"instance_images/1.JPG", "instance_images/2.png", "captions/1.txt"}
    assert contents(imported.session.folder).keys() == names | {"captions/2.caption"}
    prefix = "Rex/" if kind == "zip" else ""
    assert imported.left_out == (f"{prefix}more/3.png", f"{prefix}readme.txt")


@pytest.mark.parametrize("name", ["instance_images.zip", "captions.zip"])
def test_the_pictures_alone_are_a_session_too(
    workspace: Workspace, tmp_path: Path, name: str
) -> None:
    inner = old_session(tmp_path / "old", "old")
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        for path in sorted((inner / name.removesuffix(".zip")).iterdir()):
            archive.write(path, f"{path.parent.name}/{path.name}")
    imported = import_session(workspace, tmp_path / name, name="rex")
    assert len(contents(imported.session.folder)) == 1


def test_a_folder_without_photos_is_refused_with_what_is_wanted(
    workspace: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("x")
    with pytest.raises(SessionError, match=r"neither a session nor photos; .*\.jpg"):
        import_session(workspace, tmp_path / "docs")
    assert list(workspace.root.iterdir()) == []


def test_a_session_that_is_there_is_not_written_over(workspace: Workspace, tmp_path: Path) -> None:
    session = make_session(workspace)
    before = contents(session.folder)
    with pytest.raises(SessionError, match="there is a session 'dog' already"):
        import_session(workspace, old_session(tmp_path / "dog", "dog"))
    assert contents(session.folder) == before
    assert leftovers(workspace) == []


def test_an_empty_folder_of_that_name_is_no_session(workspace: Workspace, tmp_path: Path) -> None:
    (workspace.sessions_dir / "dog").mkdir(parents=True)
    import_session(workspace, old_session(tmp_path / "dog", "dog"))
    assert open_session(workspace, "dog").folder.is_dir()


@pytest.mark.parametrize("record", [b"{", json.dumps({"schema_version": 9, "runs": []}).encode()])
def test_a_record_that_cannot_be_read_is_refused_before_it_is_in(
    workspace: Workspace, tmp_path: Path, record: bytes
) -> None:
    old_session(tmp_path / "dog", "dog")
    (tmp_path / "dog" / "session.json").write_bytes(record)
    with pytest.raises(SessionError, match="damaged|update colabtools"):
        import_session(workspace, tmp_path / "dog")
    assert list(workspace.sessions_dir.iterdir()) == []


def test_an_unsafe_source_leaves_nothing(workspace: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("instance_images/a.png", "x")
        archive.writestr("instance_images/../../../evil", "x")
    with pytest.raises(SessionError, match="leads out"):
        import_session(workspace, path)
    assert list(workspace.root.iterdir()) == []


def test_the_bounds_and_the_room_are_looked_at_first(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = old_session(tmp_path / "dog", "dog")
    with pytest.raises(SessionError, match="more than 3 files"):
        import_session(workspace, source, bounds=Bounds(files=3))
    monkeypatch.setattr(Workspace, "free_bytes", lambda self: 100)
    with pytest.raises(StorageFullError, match="no room for the session 'dog'"):
        import_session(workspace, source)
    assert list(workspace.root.iterdir()) == []


@pytest.mark.parametrize("number", [28, 5, 107])
@pytest.mark.parametrize("call", ["write", "mkdir", "rename", "read"])
def test_a_drive_that_fails_in_the_middle_leaves_nothing_and_the_next_try_completes(
    flaky: Any, tmp_path: Path, number: int, call: str
) -> None:
    workspace = Workspace(flaky.root)
    source = old_session(tmp_path / "dog", "dog")
    flaky.fail(call, number, first=3 if call in ("write", "read") else 1)
    with pytest.raises(WorkspaceError) as why:
        import_session(workspace, source)
    assert why.value.errno == number
    flaky.recover()
    assert not (workspace.sessions_dir / "dog").exists()
    imported = import_session(workspace, source)
    assert contents(imported.session.folder) == contents(source)
    assert leftovers(workspace) == []


def test_a_drive_where_files_appear_late_takes_a_session_in_and_gives_it_out(
    flaky: Any, tmp_path: Path
) -> None:
    workspace = Workspace(flaky.root)
    source = old_session(tmp_path / "dog", "dog")
    before = contents(source)
    flaky.late = 2
    import_session(workspace, source)
    exported = export_session(workspace, "dog")
    flaky.late = 0
    assert contents(workspace.sessions_dir / "dog") == before
    with zipfile.ZipFile(exported.path) as archive:
        assert {n.removeprefix("dog/"): archive.read(n) for n in archive.namelist()} == before


@pytest.mark.parametrize("number", [28, 5, 107])
def test_an_export_that_fails_keeps_the_older_zip(
    flaky: Any, workspace: Workspace, number: int
) -> None:
    make_session(workspace)
    target = flaky.root / "dog.zip"
    target.write_bytes(b"older")
    for call in ("write", "rename"):
        flaky.fail(call, number)
        with pytest.raises(WorkspaceError, match=f"errno {number}") as why:
            export_session(workspace, "dog", target)
        assert why.value.errno == number
        flaky.recover()
        assert [path.name for path in flaky.root.iterdir()] == ["dog.zip"]
        assert target.read_bytes() == b"older"
    export_session(workspace, "dog", target)
    assert zipfile.is_zipfile(target)


def test_an_export_that_reads_back_changed_is_no_export(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_session(workspace)
    from colabtools.dreambooth import transfer

    monkeypatch.setattr(transfer, "_digests", lambda path: {})
    with pytest.raises(WorkspaceError, match="reads back changed"):
        export_session(workspace, "dog")
    assert [path.name for path in workspace.root.iterdir()] == ["Fast-Dreambooth"]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (lambda session: session.folder / "a.zip", "in the session itself"),
        (lambda session: session.folder.parent / "a.png", "is no zip"),
    ],
)
def test_a_place_where_the_zip_cannot_be_is_refused(
    workspace: Workspace, target: Callable[[Session], Path], said: str
) -> None:
    session = make_session(workspace)
    before = contents(session.folder)
    with pytest.raises(SessionError, match=said):
        export_session(workspace, "dog", target(session))
    assert contents(session.folder) == before


def test_what_a_killed_export_left_goes_with_the_next(workspace: Workspace) -> None:
    make_session(workspace)
    (workspace.root / ".dog.zip-0123abcd.part").write_bytes(b"half")
    export_session(workspace, "dog")
    assert [p.name for p in workspace.root.glob(".*")] == []


def test_what_a_killed_import_left_goes_with_the_next(workspace: Workspace, tmp_path: Path) -> None:
    left = workspace.sessions_dir / ".incoming" / "dog" / "instance_images"
    picture(left / "of another.png")
    source = old_session(tmp_path / "dog", "dog")
    assert contents(import_session(workspace, source).session.folder) == contents(source)
    assert leftovers(workspace) == []


@pytest.mark.parametrize("verb", ["import", "export"])
def test_a_session_that_another_writes_to_neither_comes_nor_goes(
    workspace: Workspace, tmp_path: Path, verb: str
) -> None:
    session = make_session(workspace)
    source = old_session(tmp_path / "cat", "cat")
    held = session.folder if verb == "export" else session.folder.with_name("cat")
    said: list[SessionBusyError] = []

    def attempt() -> None:
        try:
            if verb == "export":
                export_session(workspace, "dog")
            else:
                import_session(workspace, source)
        except SessionBusyError as error:
            said.append(error)

    with hold(held, "train"):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert len(said) == 1
    assert not (workspace.root / "dog.zip").exists()
    assert not (workspace.sessions_dir / "cat").exists()
