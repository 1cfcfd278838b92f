"""Captions edited by hand: each text reaches the file that training reads, or is refused."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from colabtools import drive
from colabtools.dreambooth.editing import list_captions, read_caption, write_caption
from colabtools.dreambooth.lease import hold
from colabtools.dreambooth.session import Session, create_session
from colabtools.errors import DatasetError, SessionBusyError, WorkspaceError


def make(folder: Path, *names: str) -> Session:
    session = create_session(drive.Workspace(folder), "dog")
    session.instance_images_dir.mkdir()
    session.captions_dir.mkdir()
    for name in names:
        Image.new("RGB", (64, 64)).save(session.instance_images_dir / name)
    return session


def write(session: Session, name: str, data: str | bytes) -> Path:
    path = session.captions_dir / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return make(tmp_path, "a.png")


@pytest.fixture
def picture(session: Session) -> Path:
    return session.instance_images_dir / "a.png"


@pytest.mark.parametrize(
    "text",
    [
        "a photo of sks-2 dog",
        "007 — zwei-drei",
        "фото собаки, 犬の写真, عكس",
        "👩‍👩‍👧 e\u0301 \u00e9",
        "\u201cquotes\u201d 'and' \"more\" | <b> & \\n",
        "x" * 5000,
    ],
)
def test_a_text_is_in_the_file_character_by_character(
    session: Session, picture: Path, text: str
) -> None:
    assert write_caption(session, picture, text) == text
    assert (session.captions_dir / "a.txt").read_bytes() == f"{text}\n".encode()
    assert read_caption(session, picture) == text


def test_lines_become_one_as_training_reads_them(session: Session, picture: Path) -> None:
    assert write_caption(session, picture, " a\n\n dog\t") == "a dog"


def test_every_picture_is_listed_with_what_is_wrong(tmp_path: Path) -> None:
    session = make(tmp_path, "a.png", "b.v2.png", "c.png", "d.png", ".hidden.png")
    write(session, "a.txt", "\ufeffa dog\r\n")
    write(session, "b.v2.txt", " \n")
    write(session, "c.caption", "a cat")
    write(session, "e.txt", "of no picture")
    entries = list_captions(session)
    assert [entry.picture.name for entry in entries] == ["a.png", "b.v2.png", "c.png", "d.png"]
    assert [entry.caption for entry in entries] == ["a dog", "", "a cat", ""]
    assert [entry.problem for entry in entries] == ["", "empty", "", "missing"]


def test_a_file_that_is_no_text_is_listed_and_can_be_typed_anew(
    session: Session, picture: Path
) -> None:
    write(session, "a.txt", b"\xff\xfe\x00d")
    (entry,) = list_captions(session)
    assert "is not UTF-8 text" in entry.problem
    assert write_caption(session, picture, "a dog") == "a dog"
    assert list_captions(session)[0].problem == ""


def test_without_pictures_it_is_said_what_makes_some(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="run prepare"):
        list_captions(make(tmp_path))


def test_a_text_goes_where_the_former_one_is_read_from(session: Session, picture: Path) -> None:
    write(session, "a.txt", "")
    other = write(session, "a.caption", "a cat")
    write_caption(session, picture, "a dog")
    assert other.read_text() == "a dog\n"
    assert (session.captions_dir / "a.txt").read_text() == ""


def test_no_words_silence_every_file_of_the_picture(session: Session, picture: Path) -> None:
    write(session, "a.txt", "a dog")
    write(session, "a.caption", "a cat")
    assert write_caption(session, picture, "") == ""
    assert read_caption(session, picture) == ""


def test_half_a_character_is_refused_and_the_old_text_stays(
    session: Session, picture: Path
) -> None:
    write(session, "a.txt", "a dog")
    with pytest.raises(DatasetError, match="half a character"):
        write_caption(session, picture, "a \ud83d")
    assert read_caption(session, picture) == "a dog"


def test_the_folder_of_captions_is_made_where_it_is_missing(
    session: Session, picture: Path
) -> None:
    session.captions_dir.rmdir()
    assert write_caption(session, picture, "a dog") == "a dog"


def test_a_picture_of_a_long_name_has_a_caption(tmp_path: Path) -> None:
    name = "é" * 125 + ".png"
    session = make(tmp_path, name)
    write_caption(session, session.instance_images_dir / name, "a dog")
    assert list_captions(session)[0].caption == "a dog"


def test_another_who_writes_to_the_session_is_not_disturbed(
    session: Session, picture: Path
) -> None:
    import threading

    refused: list[Exception] = []

    def edit() -> None:
        try:
            write_caption(session, picture, "a dog")
        except SessionBusyError as error:
            refused.append(error)

    with hold(session.folder, "train"):
        thread = threading.Thread(target=edit)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert not (session.captions_dir / "a.txt").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ENOTCONN])
def test_a_failing_drive_leaves_the_old_text(flaky: Any, number: int) -> None:
    session = make(flaky.root, "a.png")
    picture = session.instance_images_dir / "a.png"
    write_caption(session, picture, "a dog")
    with session.writing("test"):
        flaky.fail("write", number)
        with pytest.raises(WorkspaceError):
            write_caption(session, picture, "a cat")
        flaky.recover()
    assert read_caption(session, picture) == "a dog"
    assert [path.name for path in session.captions_dir.iterdir()] == ["a.txt"]


def test_what_reads_back_otherwise_is_no_success(
    session: Session, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(session, "a.txt", "a dog")
    monkeypatch.setattr("colabtools.dreambooth.editing.write_atomic", lambda path, data: None)
    with pytest.raises(DatasetError, match="reads back as 'a dog' and not as 'a cat'"):
        write_caption(session, picture, "a cat")
