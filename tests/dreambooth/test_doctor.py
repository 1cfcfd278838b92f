"""Photos of any kind: each becomes a picture of the exact size or a line that says why not."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from colabtools import images
from colabtools.dreambooth import photos as photos_module
from colabtools.dreambooth.config import PrepareConfig
from colabtools.dreambooth.dataset import Prepared, load_examples, prepare
from colabtools.dreambooth.session import create_session, open_session
from colabtools.drive import Workspace
from colabtools.errors import DatasetError, WorkspaceError

SIDE = 64


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


def picture(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Soft shapes that no other seed has."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def prepare_photos(workspace: Workspace, folder: Path, **settings: Any) -> Prepared:
    return prepare(workspace, "dog", PrepareConfig(images=str(folder), **settings))


def reasons(prepared: Prepared) -> dict[str, str]:
    return {photo.path.name: photo.reason for photo in prepared.photos}


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file()
    }


def jpeg(image: Image.Image, **options: Any) -> bytes:
    packed = io.BytesIO()
    image.save(packed, format="JPEG", **options)
    return packed.getvalue()


def png_head(width: int, height: int) -> bytes:
    """The head of a PNG that says how large it is, and has no such pixels."""
    import struct
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(100))
    parts = (
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
        for part in (head, data)
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def make_good(folder: Path) -> list[str]:
    """Write photos of every mode, orientation and awkward name; return the names."""
    names = []

    def add(name: str, image: Image.Image, **options: Any) -> None:
        image.save(folder / name, **options)
        names.append(name)

    for seed, mode in enumerate(["L", "LA", "P", "I;16", "RGBA", "CMYK", "1", "I", "F"]):
        wide = picture(seed).convert("L")
        suffix = {"CMYK": "jpg", "I": "tif", "F": "tif"}.get(mode, "png")
        if mode == "I;16":
            image = Image.fromarray(np.asarray(wide, dtype=np.uint16) * 257)
        else:
            image = (wide if mode in ("I", "F") else picture(seed)).convert(mode)
        add(f"mode {mode.replace(';', '_')}.{suffix}", image)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        add(f"turn{turn}.jpg", picture(20 + turn), exif=exif)
    frames = [picture(40), picture(41)]
    add("moves.gif", frames[0], save_all=True, append_images=frames[1:])
    add("two.mpo", frames[1].rotate(90), save_all=True, append_images=[picture(42)])
    add("new.webp", picture(43))
    for seed, stem in enumerate(["with space", 'it\'s "quoted"', "😀", "two\nlines", "ä" * 120]):
        add(f"{stem}.png", picture(50 + seed))
    add("exact.png", picture(60, (SIDE, SIDE)))
    return names


BAD = {
    "empty.jpg": (b"", "cannot be read as a picture"),
    "notes.jpg": (b"my notes\n" * 50, "cannot be read as a picture"),
    "page.png": (b"<!doctype html><html></html>", "cannot be read as a picture"),
    "half.jpg": (jpeg(picture(70))[:1500], "cannot be read as a picture"),
    "head.png": (png_head(200, 200), "cannot be read as a picture"),
    "bomb.png": (png_head(60000, 60000), "3600000000 pixels) exceeds limit"),
    "large.png": (png_head(12000, 11000), "12000 x 11000 pixels are more than 120 million"),
    "thin.jpg": (jpeg(picture(71, (3, 400))), "3 x 400 pixels are too few"),
    "strip.jpg": (jpeg(picture(72, (20000, 20))), "20000 x 20 pixels are too few"),
    "long.jpg": (jpeg(picture(73, (2000, 100))), "2000 x 100 pixels are too oblong"),
    "one.jpg": (jpeg(picture(74, (1, 1))), "1 x 1 pixels are too few"),
}


def test_every_file_becomes_a_picture_of_the_exact_size_or_a_line(
    workspace: Workspace, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = make_good(folder)
    for name, (data, _) in BAD.items():
        (folder / name).write_bytes(data)
    (folder / "a folder.jpg").mkdir()
    before = hashes(folder)
    assert len(before) >= 30
    prepared = prepare_photos(workspace, folder)
    assert hashes(folder) == before
    found = reasons(prepared)
    assert found.keys() == before.keys()
    for name, (_, reason) in BAD.items():
        assert reason in found[name], name
        assert f"left out {name}: {found[name]}" in caplog.text
    assert {name for name, reason in found.items() if not reason} == set(good)
    assert {example.size for example in prepared.examples} == {(SIDE, SIDE)}
    assert len(prepared.examples) == len(good)
    assert "Traceback" not in caplog.text


def test_a_photo_that_shows_the_same_is_left_out_and_the_largest_stays(
    workspace: Workspace, folder: Path
) -> None:
    large = picture(1, (400, 300))
    (folder / "a copy.jpg").write_bytes(jpeg(large, quality=95))
    (folder / "b same.jpg").write_bytes(jpeg(large, quality=95))
    (folder / "c packed.jpg").write_bytes(jpeg(large, quality=40))
    large.resize((200, 150)).save(folder / "0 small.png")
    picture(2).save(folder / "other.png")
    # As alike in grey, and not in colour.
    red, green, blue = large.split()
    Image.merge("RGB", (blue, green, red)).save(folder / "recoloured.png")
    assert reasons(prepare_photos(workspace, folder)) == {
        "0 small.png": "shows the same as a copy.jpg",
        "a copy.jpg": "",
        "b same.jpg": "the same file as a copy.jpg",
        "c packed.jpg": "shows the same as a copy.jpg",
        "other.png": "",
        "recoloured.png": "",
    }


def test_of_two_photos_of_one_name_the_second_is_left_out(
    workspace: Workspace, folder: Path
) -> None:
    picture(1).save(folder / "a.jpg")
    picture(2).save(folder / "a.png")
    found = reasons(prepare_photos(workspace, folder))
    assert found == {"a.jpg": "", "a.png": "called like a.jpg; rename it to use both"}


def test_doubtful_photos_are_used_with_a_hint(workspace: Workspace, folder: Path) -> None:
    grain = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    sharp = Image.fromarray(grain)
    sharp.save(folder / "sharp.png")
    Image.fromarray(grain[::-1]).filter(ImageFilter.GaussianBlur(12)).save(folder / "soft.png")
    picture(3, (400, 400)).point(lambda value: value // 10).save(folder / "dark.png")
    picture(4, (400, 400)).point(lambda value: 235 + value // 13).save(folder / "bright.png")
    sharp.crop((0, 0, 100, 120)).save(folder / "tiny.png")
    prepared = prepare_photos(workspace, folder, resolution=256, allow_resolution=True)
    hints = {photo.path.stem: photo.hints for photo in prepared.photos}
    assert hints["sharp"] == ()
    assert hints["soft"] == ("looks blurred",)
    assert "very dark" in hints["dark"]
    assert "very bright" in hints["bright"]
    assert "small: enlarged 2.6 times" in hints["tiny"]


def test_the_second_time_only_what_changed_is_decoded(
    workspace: Workspace, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(["a.jpg", "b.jpg", "c.jpg"]):
        picture(seed).save(folder / name)
    first = prepare_photos(workspace, folder)
    cut: list[str] = []
    choose = photos_module._choose_box

    def count(path: Path, *rest: Any) -> images.Box:
        cut.append(path.name)
        return choose(path, *rest)

    monkeypatch.setattr(photos_module, "_choose_box", count)
    assert prepare_photos(workspace, folder) == first
    assert cut == []
    picture(9).save(folder / "b.jpg")
    picture(8).save(folder / "d.jpg")
    second = prepare_photos(workspace, folder, replace=True)
    assert sorted(cut) == ["b.jpg", "d.jpg"]
    cut.clear()
    fresh = prepare(workspace, "fresh", PrepareConfig(images=str(folder)))
    assert len(cut) == 4
    pixels = [
        [images.load_upright(example.path).tobytes() for example in made.examples]
        for made in (second, fresh)
    ]
    assert pixels[0] == pixels[1]
    cut.clear()
    prepare_photos(workspace, folder, crop="centre", replace=True)
    assert len(cut) == 4


def test_captions_edited_in_the_session_stay(workspace: Workspace, folder: Path) -> None:
    for seed, name in enumerate(["a.jpg", "b.jpg"]):
        picture(seed).save(folder / name)
    (folder / "a.txt").write_text("a sks star on  grass")
    session = prepare_photos(workspace, folder).session
    edited = session.captions_dir / "a.txt"
    assert edited.read_text() == "a sks star on grass\n"
    edited.write_text("my own words")

    def captions() -> dict[str, str]:
        return {example.path.stem: example.caption for example in load_examples(session)}

    prepare_photos(workspace, folder)
    assert captions() == {"a": "my own words", "b": "a sks star"}
    picture(7).save(folder / "c.jpg")
    prepare_photos(workspace, folder, replace=True)
    assert captions() == {"a": "my own words", "b": "a sks star", "c": "a sks star"}
    (folder / "a.txt").write_text("other words beside the photo")
    with pytest.raises(DatasetError, match="already holds 3 captions that are not these"):
        prepare_photos(workspace, folder)
    prepare_photos(workspace, folder, replace=True)
    assert captions()["a"] == "other words beside the photo"
    kept = [path.read_text() for path in session.folder.glob("captions.old-*/a.txt")]
    assert "my own words" in " ".join(kept)


def test_a_prompt_of_two_spaces_is_the_same_prompt_again(
    workspace: Workspace, folder: Path
) -> None:
    picture(1).save(folder / "a.jpg")
    first = prepare_photos(workspace, folder, instance_prompt="a  sks dog")
    assert first.examples[0].caption == "a sks dog"
    assert prepare_photos(workspace, folder, instance_prompt="a  sks dog") == first


def test_a_caption_is_found_by_a_name_that_a_mac_spells_otherwise(
    workspace: Workspace, folder: Path
) -> None:
    picture(1).save(folder / "gr\u00fcn.jpg")
    (folder / "gru\u0308n.TXT").write_text("a green sks star")
    (example,) = prepare_photos(workspace, folder).examples
    assert example.caption == "a green sks star"


def test_the_report_tells_of_every_photo_with_its_final_prompt(
    workspace: Workspace, folder: Path
) -> None:
    picture(1).save(folder / "a.jpg")
    picture(2).save(folder / "<b>&.jpg")
    (folder / "<b>&.txt").write_text("red " * 90)
    (folder / "c.jpg").write_bytes(b"no photo")
    prepared = prepare_photos(workspace, folder)
    rows = json.loads(prepared.report.with_suffix(".json").read_text())["photos"]
    by_name = {row["photo"]: row for row in rows}
    assert by_name["a.jpg"]["prompt"] == "a sks star"
    assert 4 <= by_name["a.jpg"]["tokens"] <= 8
    long = by_name["<b>&.jpg"]
    assert long["tokens"] == 92
    assert long["hints"][-1] == "92 tokens: the text encoder reads the first 77"
    assert by_name["c.jpg"]["used"] is False
    assert by_name["c.jpg"]["prompt"] is None
    page = prepared.report.read_text()
    assert "2 of 3 photos are used" in page
    assert "&lt;b&gt;&amp;.jpg" in page
    assert "<b>&.jpg" not in page
    assert page.count("data:image/jpeg;base64,") == 4


def test_a_damaged_memory_is_made_anew(workspace: Workspace, folder: Path) -> None:
    picture(1).save(folder / "a.jpg")
    first = prepare_photos(workspace, folder)
    memory = first.session.folder / ".cache" / "photos.json"
    good = memory.read_bytes()
    for damage in (
        b"",
        b"[]",
        b'{"version": 1, "photos": 3}',
        good[:-20],
        good.replace(b"a", b"b"),
    ):
        memory.write_bytes(damage)
        assert prepare_photos(workspace, folder) == first
        assert memory.read_bytes() == good


@pytest.mark.parametrize("calls", [1, 4, 9, 14])
def test_a_drive_that_fails_in_the_middle_is_one_line_and_again_completes(
    workspace: Workspace, folder: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    for seed in range(4):
        picture(seed).save(folder / f"{seed}.jpg")
    before = hashes(folder)
    create_session(workspace, "dog")
    fsync, left = os.fsync, [calls]

    def failing(handle: int) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(WorkspaceError, match="mount it again") as why:
        prepare_photos(workspace, folder)
    assert "\n" not in str(why.value)
    monkeypatch.undo()
    assert len(prepare_photos(workspace, folder).examples) == 4
    assert hashes(folder) == before


@pytest.mark.heavy
def test_a_kill_at_any_moment_loses_no_photo_and_no_caption(
    workspace: Workspace, folder: Path
) -> None:
    """Edits of captions are what only the session has."""
    for seed in range(24):
        picture(seed, (1200, 900)).save(folder / f"{seed:02}.jpg")
    edited = prepare_photos(workspace, folder).session.captions_dir / "00.txt"
    edited.write_text("my own words")
    before = hashes(folder)
    rng = random.Random(0)
    killed = 0
    for number in range(12):
        picture(100 + number, (1200, 900)).save(folder / "23.jpg")
        before = hashes(folder)
        argv = [sys.executable, "-m", "colabtools.cli", "dreambooth", "prepare", "--quiet"]
        argv += ["--session", "dog", "--images", str(folder), "--replace"]
        argv += ["--workspace", str(workspace.root)]
        child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 3.0))
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            killed += 1
        child.wait()
        assert hashes(folder) == before
        session = open_session(workspace, "dog")
        texts = [path.read_text() for path in session.folder.glob("captions*/00.txt")]
        texts += [path.read_text() for path in session.folder.glob(".captions.part/00.txt")]
        assert "my own words" in " ".join(texts)
    assert killed
