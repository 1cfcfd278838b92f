"""What came from elsewhere is read only where it is safe; zips are made as an attacker would."""

from __future__ import annotations

import os
import random
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest

from colabtools.dreambooth.archive import Bounds, copy_entries, open_entries, unpack_folder
from colabtools.errors import SessionError, WorkspaceError


def make_zip(path: Path, *names: str, data: bytes = b"x", mode: int = 0, method: int = 0) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo("placeholder")
            # Past ZipInfo, which would repair it.
            info.filename = name
            info.compress_type = method
            info.external_attr = mode << 16
            archive.writestr(info, data)
    return path


def refusal(source: Path, bounds: Bounds | None = None) -> str:
    with pytest.raises(SessionError) as caught, open_entries(source, bounds or Bounds()):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../evil.png", "leads out of"),
        ("a/../../evil.png", "leads out of"),
        ("/etc/evil", "leads out of"),
        ("a//b.png", "leads out of"),
        ("./a.png", "leads out of"),
        ("..\\evil.png", "file systems refuse"),
        ("C:/evil.png", "file systems refuse"),
        ("c:evil.png", "file systems refuse"),
        ("a\nb.png", "file systems refuse"),
        ("a\x1bb.png", "file systems refuse"),
        ("captions/CON", "is a device"),
        ("nul.txt", "is a device"),
        ("com1.tar.gz", "is a device"),
        ("a./b.png", "ends with a dot or a space"),
        ("b.png ", "ends with a dot or a space"),
        ("ä" * 128, "is too long"),
        ("/".join("abcdefghijklmnopq"), "is too long"),
    ],
)
def test_a_name_that_is_not_safe_everywhere_is_refused(
    tmp_path: Path, name: str, said: str
) -> None:
    assert said in refusal(make_zip(tmp_path / "a.zip", "good.png", name))


def test_what_follows_a_nul_in_a_name_is_not_overlooked(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", "goodNevil.png")
    path.write_bytes(path.read_bytes().replace(b"goodNevil", b"good\0evil"))
    assert "file systems refuse" in refusal(path)


@pytest.mark.parametrize(
    "names",
    [
        ("Dog.png", "dog.PNG"),
        ("captions/a.txt", "Captions/b.txt"),
        ("e\u0301.png", "\u00e9.png"),
        ("straße.png", "STRASSE.png"),
        ("a", "a/b.png"),
        ("A", "a/b.png"),
    ],
)
def test_two_names_that_are_one_on_drive_or_windows_are_refused(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    assert "are one name on many file systems" in refusal(make_zip(tmp_path / "a.zip", *names))


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = make_zip(tmp_path / "a.zip", "a.png", "a.png")
    assert "one name" in refusal(path)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO])
def test_links_and_devices_in_a_zip_are_refused(tmp_path: Path, kind: int) -> None:
    path = make_zip(tmp_path / "a.zip", "a.png", data=b"/etc/passwd", mode=kind | 0o777)
    assert "is a link or a device" in refusal(path)


def test_links_and_pipes_in_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "a.png").symlink_to("/etc/passwd")
    assert "is a link" in refusal(tmp_path / "link")
    (tmp_path / "outside").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "captions").symlink_to(tmp_path / "outside")
    assert "is a link" in refusal(tmp_path / "folder")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "a.png")
    assert "is no plain file" in refusal(tmp_path / "pipe")


def test_a_file_that_became_a_link_since_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(b"12345")
    (tmp_path / "secret").write_bytes(b"54321")
    (tmp_path / "out").mkdir()
    with pytest.raises(WorkspaceError), open_entries(tmp_path / "in", Bounds()) as entries:
        (tmp_path / "in" / "a").unlink()
        (tmp_path / "in" / "a").symlink_to(tmp_path / "secret")
        copy_entries(entries, tmp_path / "out", "copying")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_bomb_is_refused_by_its_ratio(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", "a.png", data=bytes(20_000_000), method=8)
    assert path.stat().st_size < 30_000
    assert "unpacks from 19 kB to 20 MB" in refusal(path)


def test_a_bomb_of_overlapping_files_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", "a.png", data=bytes(range(256)) * 40)
    data = path.read_bytes()
    at = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    record = data[at:end]
    many = b"".join(record.replace(b"a.png", b"%c.png" % (97 + n)) for n in range(20))
    tail = bytearray(data[end:])
    struct.pack_into("<HHII", tail, 8, 20, 20, len(many), at)
    path.write_bytes(data[:at] + many + tail)
    assert len(zipfile.ZipFile(path).namelist()) == 20
    assert "more than its own size" in refusal(path)


def test_the_bounds_hold_for_folders_and_zips(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", "a", "b", "c", data=b"12345")
    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / "in" / name).write_bytes(b"12345")
    for source in (path, tmp_path / "in"):
        assert "more than 2 files" in refusal(source, Bounds(files=2))
        assert "more than 14 B" in refusal(source, Bounds(size_bytes=14))
        with open_entries(source, Bounds(files=3, size_bytes=15)) as entries:
            assert [str(entry.path) for entry in entries] == ["a", "b", "c"]


def test_a_zip_that_says_less_than_it_holds_is_refused_while_it_is_read(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", "a.png", data=bytes(5000), method=8)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    struct.pack_into("<I", data, at + 24, 10)
    path.write_bytes(data)
    (tmp_path / "out").mkdir()
    with pytest.raises(SessionError, match="damaged"), open_entries(path, Bounds()) as entries:
        copy_entries(entries, tmp_path / "out", "copying")


@pytest.mark.parametrize("what", ["cut", "flipped", "text", "encrypted", "method"])
def test_a_zip_that_cannot_be_read_is_refused(tmp_path: Path, what: str) -> None:
    data = bytes(range(256)) * 100
    path = make_zip(tmp_path / "a.zip", "a.png", data=data, method=0)
    raw = bytearray(path.read_bytes())
    central = raw.index(b"PK\x01\x02")
    if what == "cut":
        raw = raw[:2000]
    elif what == "flipped":
        raw[500] ^= 1
    elif what == "text":
        raw = bytearray(b"<html>quota exceeded</html>")
    elif what == "encrypted":
        raw[central + 8] |= 1
    else:
        raw[central + 10] = 14
    path.write_bytes(raw)
    (tmp_path / "out").mkdir()
    said = "damaged|neither a folder nor a zip|encrypted|packed by method 14"
    with pytest.raises(SessionError, match=said), open_entries(path, Bounds()) as entries:
        copy_entries(entries, tmp_path / "out", "copying")


def test_a_source_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert "does not exist; give a folder or a zip" in refusal(tmp_path / "gone")


def test_what_systems_leave_is_passed_over(tmp_path: Path) -> None:
    litter = ["__MACOSX/._a.png", ".DS_Store", "Thumbs.db", "a/desktop.ini", ".cache/x"]
    path = make_zip(tmp_path / "a.zip", "a/b.png", *litter)
    with open_entries(path, Bounds()) as entries:
        assert [str(entry.path) for entry in entries] == ["a/b.png"]


def test_names_that_people_give_come_through(tmp_path: Path) -> None:
    names = ['it\'s "me" (1).png', "🐕.png", "a b/ü.txt", "x" * 251 + ".png", "a?.png"]
    path = make_zip(tmp_path / "a.zip", *names)
    (tmp_path / "out").mkdir()
    with open_entries(path, Bounds()) as entries:
        copy_entries(entries, tmp_path / "out", "copying")
    assert all((tmp_path / "out" / name).read_bytes() == b"x" for name in names)


@pytest.mark.parametrize("prefix", ["instance_images/", ""])
def test_the_zip_of_the_established_notebook_is_unpacked_once(tmp_path: Path, prefix: str) -> None:
    archive, folder = tmp_path / "instance_images.zip", tmp_path / "instance_images"
    make_zip(archive, f"{prefix}a.png", f"{prefix}b (1).png")
    folder.mkdir()
    (tmp_path / ".instance_images.unpacked").mkdir()
    assert unpack_folder(archive, folder) is True
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b (1).png"]
    assert unpack_folder(archive, folder) is False
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name, archive.name]


def test_a_folder_that_holds_anything_is_left_alone(tmp_path: Path) -> None:
    archive, folder = tmp_path / "captions.zip", tmp_path / "captions"
    make_zip(archive, "captions/a.txt")
    folder.mkdir()
    (folder / "mine.txt").write_text("kept")
    assert unpack_folder(archive, folder) is False
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_an_unsafe_zip_in_a_session_leaves_nothing(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "captions.zip", "captions/a.txt", "../evil")
    with pytest.raises(SessionError, match="leads out"):
        unpack_folder(archive, tmp_path / "captions")
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize("number", [28, 5, 107])
@pytest.mark.parametrize("call", ["write", "mkdir", "rename"])
def test_a_drive_that_fails_while_unpacking_is_told_and_the_next_try_completes(
    flaky: Any, number: int, call: str
) -> None:
    folder = flaky.root / "captions"
    archive = make_zip(flaky.root / "captions.zip", "captions/a.txt", "captions/b.txt")
    flaky.fail(call, number, first=2 if call == "write" else 1)
    with pytest.raises(WorkspaceError, match=f"errno {number}"):
        unpack_folder(archive, folder)
    flaky.recover()
    assert not folder.exists()
    assert unpack_folder(archive, folder) is True
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("large", [False, True], ids=["zip", "zip64"])
def test_a_list_that_would_fill_the_memory_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 10)
    path = make_zip(tmp_path / "a.zip", *(f"{number}" * 60 for number in range(10, 40)))
    assert (b"PK\x06\x06" in path.read_bytes()) is large
    with open_entries(path, Bounds(files=30)) as entries:
        assert len(entries) == 30

    def read(*args: object) -> None:
        raise AssertionError("the list was read")

    monkeypatch.setattr(zipfile, "ZipFile", read)
    assert "more than 2 files" in refusal(path, Bounds(files=2))


@pytest.mark.parametrize("large", [False, True], ids=["zip", "zip64"])
def test_a_zip_with_any_damage_is_read_right_or_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    names = ["instance_images/a.png", "captions/a.txt", "dog.ckpt"]
    path = make_zip(tmp_path / "a.zip", *names, data=b"the same text " * 9, method=8)
    whole, chance = path.read_bytes(), random.Random(0)
    refused = 0
    for number in range(400):
        raw = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        if number % 4 == 0:
            del raw[chance.randrange(len(raw)) :]
        path.write_bytes(raw)
        out = tmp_path / str(number)
        out.mkdir()
        try:
            with open_entries(path, Bounds()) as entries:
                copy_entries(entries, out, "copying")
        except (SessionError, WorkspaceError) as error:
            assert "\n" not in str(error)
            refused += 1
        files = [p for p in out.rglob("*") if p.is_file()]
        assert all(p.resolve().is_relative_to(out) for p in files)
    assert refused > 200
