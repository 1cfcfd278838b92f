"""Photos into a session: upright pictures with captions, stored once, never half."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from colabtools import images, micro
from colabtools.dreambooth import boxes, doctor
from colabtools.dreambooth.config import PrepareConfig
from colabtools.dreambooth.dataset import (
    Example,
    Prepared,
    check_examples,
    fingerprint,
    load_examples,
    prepare,
    split_heldout,
)
from colabtools.dreambooth.session import Session, create_session, open_session
from colabtools.drive import Workspace
from colabtools.errors import (
    ConfigError,
    DatasetError,
    ImageError,
    ModelError,
    SessionError,
    WorkspaceError,
)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "my photos"
    folder.mkdir()
    return folder


def add_photo(folder: Path, name: str, *, seed: int = 0, size: tuple[int, int] = (90, 70)) -> Path:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path = folder / name
    Image.fromarray(noise).save(path)
    return path


def prepare_photos(workspace: Workspace, folder: Path, **settings: Any) -> Prepared:
    return prepare(workspace, "dog", PrepareConfig(images=str(folder), **settings))


def state(folders: Iterable[Path]) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file below some folders."""
    files = (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def stored(session: Session) -> dict[str, str]:
    return {example.path.name: example.caption for example in load_examples(session)}


def test_the_demo_pictures_keep_their_pixels_and_captions(workspace: Workspace) -> None:
    prepared = prepare(workspace, "robot", PrepareConfig(images="demo"))
    source = micro.subject_path()
    assert len(prepared.examples) == 5
    for example in prepared.examples:
        original = images.load_upright(source / example.path.name)
        assert images.load_upright(example.path).tobytes() == original.tobytes()
        text = (source / example.path.name).with_suffix(".txt").read_text()
        assert example.caption == text.strip()
    record = open_session(workspace, "robot").read_record()
    assert (record["base_model"], record["resolution"]) == ("micro", 64)
    assert record["pictures"] == fingerprint(prepared.examples)


def test_photos_become_squares_of_the_resolution_in_the_order_of_their_names(
    workspace: Workspace, photos: Path
) -> None:
    for seed, name in enumerate(["b.png", "A.jpg", "a 2.webp", "10.tiff", "9.JPEG", "ü.bmp"]):
        add_photo(photos, name, seed=seed, size=(50 + 30 * seed, 130))
    (photos / "notes.md").write_text("not a photo")
    (photos / "._b.png").write_bytes(b"what a Mac leaves")
    (photos / "folder.png").mkdir()
    prepared = prepare_photos(workspace, photos, resolution=72)
    names = [example.path.name for example in prepared.examples]
    assert names == ["10.png", "9.png", "A.png", "a 2.png", "b.png", "ü.png"]
    for example in prepared.examples:
        assert example.size == (72, 72)
        with Image.open(example.path) as picture:
            assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (72, 72))


def test_with_buckets_each_photo_keeps_its_shape_as_nearly_as_can_be(
    workspace: Workspace, photos: Path
) -> None:
    sizes = {
        "square": (90, 90),
        "camera": (120, 90),
        "upright": (90, 120),
        "panorama": (400, 90),
        "exact": (80, 48),
    }
    for seed, (name, size) in enumerate(sizes.items()):
        add_photo(photos, f"{name}.png", seed=seed, size=size)
    prepared = prepare_photos(workspace, photos, buckets=True)
    assert {example.path.stem: example.size for example in prepared.examples} == {
        "square": (64, 64),
        "camera": (72, 56),
        "upright": (56, 72),
        "panorama": (80, 48),
        "exact": (80, 48),
    }
    for example in prepared.examples:
        original = images.load_upright(photos / example.path.name)
        fitted = images.fit(original, *example.size)
        assert images.load_upright(example.path).tobytes() == fitted.tobytes()
    assert prepared.session.read_record()["buckets"] is True
    before = state([workspace.root])
    assert prepare_photos(workspace, photos, buckets=True) == prepared
    assert state([workspace.root]) == before
    with pytest.raises(DatasetError, match="already holds 5 pictures"):
        prepare_photos(workspace, photos)


def test_a_resolution_that_the_base_model_cannot_draw_is_refused_unless_allowed(
    workspace: Workspace, photos: Path
) -> None:
    add_photo(photos, "a.png")
    workspace.root.mkdir()
    with pytest.raises(ConfigError, match="resolution is 768; micro was trained at 64"):
        prepare_photos(workspace, photos, resolution=768)
    assert list(workspace.root.iterdir()) == []
    (example,) = prepare_photos(workspace, photos, resolution=128, allow_resolution=True).examples
    assert example.size == (128, 128)


def test_a_sideways_photo_is_stored_upright(workspace: Workspace, photos: Path) -> None:
    picture = Image.open(add_photo(photos, "a.png", size=(64, 64)))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(photos / "a.png", exif=exif)
    (example,) = prepare_photos(workspace, photos).examples
    assert images.load_upright(example.path).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    ("files", "caption"),
    [
        ({}, "a sks dog"),
        ({"a.txt": b"my dog\n"}, "my dog"),
        ({"a.caption": b"my dog"}, "my dog"),
        ({"a.txt": b"text wins", "a.caption": b"other"}, "text wins"),
        ({"a.txt": b""}, "a sks dog"),
        ({"a.txt": b" \n\t"}, "a sks dog"),
        ({"a.txt": b"", "a.caption": b"the fuller one"}, "the fuller one"),
        ({"a.txt": b"\xef\xbb\xbfmy dog\r\n"}, "my dog"),
        ({"a.txt": b"on\r\ntwo  lines"}, "on two lines"),
        ({"a.txt": "犬 ü 🐕".encode()}, "犬 ü 🐕"),
        ({"b.txt": b"of another photo", "a.jpg.txt": b"no"}, "a sks dog"),
    ],
)
def test_a_caption_comes_from_the_file_beside_the_photo(
    workspace: Workspace, photos: Path, files: dict[str, bytes], caption: str
) -> None:
    add_photo(photos, "a.jpg")
    for name, data in files.items():
        (photos / name).write_bytes(data)
    (example,) = prepare_photos(workspace, photos, instance_prompt=" a sks dog ").examples
    assert example.caption == caption


def test_a_dotted_name_keeps_its_caption(workspace: Workspace, photos: Path) -> None:
    add_photo(photos, "my.dog.v2.jpg")
    (photos / "my.dog.v2.txt").write_text("my dog")
    assert stored(prepare_photos(workspace, photos).session) == {"my.dog.v2.png": "my dog"}


def test_the_contact_sheet_pairs_each_photo_with_its_own_square(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As names of files `a.jpg` comes before `a.k.jpg`, as `.png` after it."""
    add_photo(photos, "a.jpg", seed=1)
    add_photo(photos, "a.k.jpg", seed=2)
    drawn: dict[str, Any] = {}

    def save_grid(rows: Any, path: Path, **titles: Any) -> Path:
        drawn.update(rows=rows, titles=titles["row_titles"])
        return path

    monkeypatch.setattr(doctor, "save_grid", save_grid)
    prepared = prepare_photos(workspace, photos, resolution=64)
    for title, (photo, picture) in zip(drawn["titles"], drawn["rows"], strict=True):
        stem = title.split(":")[0]
        original = images.load_upright(photos / f"{stem}.jpg")
        kept = images.load_upright(prepared.session.instance_images_dir / f"{stem}.png")
        for drawn_picture, wanted in ((photo, original), (picture, kept)):
            assert drawn_picture.size == wanted.size
            difference = np.asarray(drawn_picture, dtype=int) - np.asarray(wanted, dtype=int)
            # As a JPEG stores noise; another picture differs by 85 in the mean. A frame is red.
            assert np.median(abs(difference)) < 40


def test_the_contact_sheet_is_a_picture(workspace: Workspace, photos: Path) -> None:
    add_photo(photos, "a.jpg")
    sheet = prepare_photos(workspace, photos).contact_sheet
    assert sheet.parent == open_session(workspace, "dog").logs_dir
    assert min(images.load_upright(sheet).size) > 100


def test_originals_are_unchanged_byte_for_byte(workspace: Workspace, photos: Path) -> None:
    add_photo(photos, "a.jpg")
    (photos / "a.txt").write_bytes(b"\xef\xbb\xbfcaption\r\n")
    before = state([photos])
    prepare_photos(workspace, photos)
    prepare_photos(workspace, photos, instance_prompt="x", replace=True)
    assert state([photos]) == before


def test_the_same_photos_again_change_nothing(workspace: Workspace, photos: Path) -> None:
    for seed, name in enumerate(["a.jpg", "b.png"]):
        add_photo(photos, name, seed=seed)
    first = prepare_photos(workspace, photos)
    before = state([workspace.root])
    for replace in (False, True):
        assert prepare_photos(workspace, photos, replace=replace) == first
    assert state([workspace.root]) == before


def test_the_same_pixels_packed_by_another_library_are_the_same_photos(
    workspace: Workspace, photos: Path
) -> None:
    """Colab's images change under a session, and with them the bytes of a PNG."""
    add_photo(photos, "a.png")
    (example,) = prepare_photos(workspace, photos).examples
    with Image.open(example.path) as picture:
        picture.save(example.path, compress_level=0)
    (example.path.parent / ".DS_Store").write_bytes(b"a Mac was here")
    session = open_session(workspace, "dog")
    folders = [session.instance_images_dir, session.captions_dir, session.logs_dir]
    before = state(folders)
    prepare_photos(workspace, photos)
    assert state(folders) == before


@pytest.mark.parametrize("change", ["pixels", "added", "removed", "renamed", "caption", "prompt"])
def test_other_photos_are_refused_and_with_replace_the_old_are_kept(
    workspace: Workspace, photos: Path, change: str
) -> None:
    for seed, name in enumerate(["a.png", "b.png"]):
        add_photo(photos, name, seed=seed)
    session = prepare_photos(workspace, photos).session
    old = stored(session), state([session.instance_images_dir]), state([session.captions_dir])
    settings = {"instance_prompt": "a sks cat"} if change == "prompt" else {}
    changes = {
        "pixels": lambda: add_photo(photos, "a.png", seed=9),
        "added": lambda: add_photo(photos, "c.png", seed=9),
        "removed": lambda: (photos / "b.png").unlink(),
        "renamed": lambda: (photos / "b.png").rename(photos / "c.png"),
        "caption": lambda: (photos / "a.txt").write_text("other words"),
        "prompt": lambda: None,
    }
    changes[change]()
    before = state([workspace.root])
    with pytest.raises(
        DatasetError, match=r"already holds 2 (pictures|captions) that are not"
    ) as e:
        prepare_photos(workspace, photos, **settings)
    assert "\n" not in str(e.value)
    assert state([workspace.root]) == before
    new = prepare_photos(workspace, photos, **settings, replace=True)
    assert stored(new.session) != old[0] or change == "pixels"
    times = [time for _, time in (old[1] | old[2]).values()]
    kept = state(p for p in session.folder.iterdir() if "old-1" in p.name)
    assert kept
    assert {time for _, time in kept.values()} <= set(times)
    assert prepare_photos(workspace, photos, **settings) == new
    assert not [path for path in session.folder.iterdir() if path.name.endswith(".part")]


def test_pictures_kept_aside_keep_their_captions_number(workspace: Workspace, photos: Path) -> None:
    add_photo(photos, "a.png", seed=1)
    session = prepare_photos(workspace, photos).session
    prepare_photos(workspace, photos, instance_prompt="a sks cat", replace=True)
    add_photo(photos, "b.png", seed=2)
    prepare_photos(workspace, photos, replace=True)
    names = sorted(path.name for path in session.folder.iterdir() if ".old-" in path.name)
    assert names == ["captions.old-1", "captions.old-2", "instance_images.old-2"]


def test_another_resolution_is_another_set_of_pictures(workspace: Workspace, photos: Path) -> None:
    add_photo(photos, "a.png")
    prepare_photos(workspace, photos)
    with pytest.raises(DatasetError, match="already holds 1 pictures"):
        prepare_photos(workspace, photos, resolution=96)


def test_pictures_that_lost_their_captions_get_them_again(
    workspace: Workspace, photos: Path
) -> None:
    """As after a runtime that died between the two renames."""
    add_photo(photos, "a.png")
    session = prepare_photos(workspace, photos).session
    picture = state([session.instance_images_dir])
    shutil.rmtree(session.captions_dir)
    session.captions_dir.with_name(".captions.part").mkdir()
    (session.captions_dir.with_name(".captions.part") / "a.txt").write_text("half")
    prepare_photos(workspace, photos)
    assert stored(session) == {"a.png": "a sks star"}
    assert state([session.instance_images_dir]) == picture


def test_a_damaged_picture_in_the_session_is_not_taken_for_the_same(
    workspace: Workspace, photos: Path
) -> None:
    add_photo(photos, "a.png")
    (example,) = prepare_photos(workspace, photos).examples
    example.path.write_bytes(b"")
    with pytest.raises(DatasetError, match="already holds 1 pictures"):
        prepare_photos(workspace, photos)
    assert prepare_photos(workspace, photos, replace=True).examples == (example,)
    images.load_upright(example.path)


def break_photos(photos: Path, kind: str) -> str:
    """Make a folder that cannot be prepared and return it as text, or the text of another."""
    picture = add_photo(photos, "a.png")
    texts = {
        "file": str(picture),
        "inside a file": str(picture / "deeper"),
        "missing": str(photos / "nothing"),
        "no such user": "~no-such-user-here/photos",
        "too long": "x" * 5000,
    }
    damage: dict[str, Callable[[], object]] = {
        "cut": lambda: picture.write_bytes(picture.read_bytes()[:900]),
        "empty": lambda: picture.rename(photos / "a.doc"),
        "not UTF-8": lambda: (photos / "a.txt").write_bytes("schöner hund".encode("latin-1")),
        "text": lambda: picture.write_text("my notes"),
    }
    if kind in damage:
        damage[kind]()
    return texts.get(kind, str(photos))


BROKEN: list[tuple[str, type[Exception], str]] = [
    ("cut", DatasetError, r"^none of the 1 photos in .* can be used; 'a.png': cannot be read as"),
    ("empty", DatasetError, "^no photos in .*put some of .avif, "),
    ("file", DatasetError, "is a file; give the folder"),
    ("inside a file", DatasetError, "does not exist"),
    ("missing", DatasetError, "nothing' does not exist; give a folder"),
    ("no such user", DatasetError, "cannot be read"),
    ("not UTF-8", DatasetError, r"a\.txt cannot be read .*save it as UTF-8"),
    ("text", DatasetError, r"^none of the 1 photos in .* can be used; 'a.png': cannot be read as"),
    ("too long", DatasetError, "cannot be read"),
]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("broken", BROKEN, ids=[row[0] for row in BROKEN])
def test_photos_that_cannot_be_prepared_leave_everything_as_it_was(
    workspace: Workspace, photos: Path, broken: tuple[str, type[Exception], str], existing: bool
) -> None:
    kind, error, message = broken
    workspace.root.mkdir()
    if existing:
        prepare(workspace, "dog", PrepareConfig(images="demo"))
    text = break_photos(photos, kind)
    before = state([photos, workspace.root])
    with pytest.raises(error, match=message) as why:
        prepare(workspace, "dog", PrepareConfig(images=text, replace=True))
    assert "\n" not in str(why.value)
    assert state([photos, workspace.root]) == before
    assert existing or list(workspace.root.iterdir()) == []


@pytest.mark.parametrize(
    ("session", "settings", "error"),
    [("../dog", {}, SessionError), ("dog", {"base_model": "nope"}, ModelError)],
)
def test_a_bad_session_or_model_leaves_no_session(
    workspace: Workspace, session: str, settings: dict[str, Any], error: type[Exception]
) -> None:
    workspace.root.mkdir()
    with pytest.raises(error):
        prepare(workspace, session, PrepareConfig(images="demo", **settings))
    assert list(workspace.root.iterdir()) == []


@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_fills_while_storing_keeps_the_old_pictures(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    add_photo(photos, "a.png", seed=1)
    session = create_session(workspace, "dog")
    if existing:
        prepare_photos(workspace, photos)
        add_photo(photos, "a.png", seed=2)
    before = state([workspace.root])

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkspaceError, match="No space left"):
        prepare_photos(workspace, photos, replace=True)
    monkeypatch.undo()
    assert state([workspace.root]) == before
    assert not [path for path in session.folder.iterdir() if path.name.endswith(".part")]
    assert len(prepare_photos(workspace, photos, replace=True).examples) == 1


def test_an_old_session_of_the_established_notebook_loads(workspace: Workspace) -> None:
    folder = workspace.sessions_dir / "rex"
    for part in ("instance_images", "captions"):
        (folder / part).mkdir(parents=True)
    for seed, name in enumerate(["rex (2).jpg", "rex (1).jpg", "rex (3).JPG"]):
        add_photo(folder / "instance_images", name, seed=seed)
        caption = "\ufeffmy dog\r\n" if seed == 0 else f"rex {seed}"
        (folder / "captions" / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    (folder / "instance_images" / "._rex (1).jpg").write_bytes(b"a Mac was here")
    (folder / "instance_images.zip").write_bytes(b"PK")
    before = state([folder])
    examples = load_examples(open_session(workspace, "rex"))
    assert [(example.path.name, example.caption) for example in examples] == [
        ("rex (1).jpg", "rex 1"),
        ("rex (2).jpg", "my dog"),
        ("rex (3).JPG", "rex 2"),
    ]
    assert state([folder]) == before


def test_a_session_without_pictures_is_refused(workspace: Workspace) -> None:
    session = create_session(workspace, "dog")
    with pytest.raises(DatasetError, match="'dog' has no training pictures; run prepare"):
        load_examples(session)
    session.instance_images_dir.mkdir()
    (session.instance_images_dir / ".a.png").touch()
    with pytest.raises(DatasetError, match="no training pictures"):
        load_examples(session)


@pytest.mark.parametrize(
    ("data", "message"),
    [(None, "has no caption; write one to"), (b"\xff\xfea", "save it as UTF-8")],
)
def test_a_picture_without_a_readable_caption_is_refused_by_name(
    workspace: Workspace, photos: Path, data: bytes | None, message: str
) -> None:
    add_photo(photos, "a.png")
    session = prepare_photos(workspace, photos).session
    caption = session.captions_dir / "a.txt"
    caption.unlink()
    if data is not None:
        caption.write_bytes(data)
    with pytest.raises(DatasetError, match=message) as why:
        load_examples(session)
    assert str(caption) in str(why.value)


def test_a_caption_file_of_either_suffix_belongs_to_a_stored_picture(
    workspace: Workspace, photos: Path
) -> None:
    add_photo(photos, "my.dog.png")
    session = prepare_photos(workspace, photos).session
    (session.captions_dir / "my.dog.txt").rename(session.captions_dir / "my.dog.caption")
    assert stored(session) == {"my.dog.png": "a sks star"}


def three_examples(workspace: Workspace, photos: Path) -> Prepared:
    for seed, name in enumerate(["a.png", "b.png", "c.png"]):
        add_photo(photos, name, seed=seed)
    return prepare_photos(workspace, photos)


def test_what_was_prepared_passes_the_check_and_stays_as_it_is(
    workspace: Workspace, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = three_examples(workspace, photos)
    before = state([workspace.root])
    check_examples(prepared.session, prepared.examples, strict=True)
    assert state([workspace.root]) == before
    assert caplog.messages == []


def test_a_picture_that_is_cut_off_in_mid_set_is_named(workspace: Workspace, photos: Path) -> None:
    prepared = three_examples(workspace, photos)
    path = prepared.examples[1].path
    path.write_bytes(path.read_bytes()[:-2000])
    examples = load_examples(prepared.session)
    with pytest.raises(ImageError, match=r"^b\.png cannot be read as a picture") as why:
        check_examples(prepared.session, examples, strict=False)
    assert "\n" not in str(why.value)


def test_a_file_that_is_no_picture_is_named_when_examples_are_loaded(
    workspace: Workspace, photos: Path
) -> None:
    prepared = three_examples(workspace, photos)
    prepared.examples[1].path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"^b\.png cannot be read as a picture"):
        load_examples(prepared.session)


@pytest.mark.parametrize("change", ["empty", "orphan"])
def test_a_caption_without_words_or_picture_is_refused_if_strict_and_else_named(
    workspace: Workspace, photos: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    session = three_examples(workspace, photos).session
    name = {"empty": "b.txt", "orphan": "d.txt"}[change]
    (session.captions_dir / name).write_text("" if change == "empty" else "a dog")
    examples = load_examples(session)
    with pytest.raises(DatasetError, match=name) as why:
        check_examples(session, examples, strict=True)
    assert "\n" not in str(why.value)
    check_examples(session, examples, strict=False)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert name in caplog.text


def test_a_picture_whose_edge_would_be_dropped_is_refused(
    workspace: Workspace, photos: Path
) -> None:
    """As those of an old session can be, which nobody made the right size."""
    prepared = three_examples(workspace, photos)
    add_photo(prepared.session.instance_images_dir, "b.png", size=(64, 60))
    with pytest.raises(DatasetError, match=r"^b\.png .* is 64 x 60 pixels; both must be multiples"):
        check_examples(prepared.session, load_examples(prepared.session), strict=False)


def named(count: int) -> tuple[Example, ...]:
    return tuple(Example(Path(f"{number:03}.png"), "a dog", (64, 64)) for number in range(count))


def test_held_out_pictures_are_set_apart_in_their_order() -> None:
    examples = named(20)
    train, heldout = split_heldout(examples, 5, seed=0)
    assert (len(train), len(heldout)) == (15, 5)
    assert set(train) | set(heldout) == set(examples)
    assert (sorted(train, key=lambda e: e.path), sorted(heldout, key=lambda e: e.path)) == (
        list(train),
        list(heldout),
    )
    assert split_heldout(examples, 5, seed=0) == (train, heldout)
    assert len({split_heldout(examples, 5, seed)[1] for seed in range(10)}) > 5
    assert split_heldout(examples, 0, seed=0) == (examples, ())


def test_a_picture_more_exchanges_at_most_one_held_out_picture() -> None:
    examples = named(40)
    for count in range(10, 39):
        before = set(split_heldout(examples[:count], 5, seed=1)[1])
        after = set(split_heldout(examples[: count + 1], 5, seed=1)[1])
        assert after <= before | {examples[count]}


def test_a_name_that_a_mac_spells_otherwise_has_the_same_lot() -> None:
    others = named(9)
    for spelling in ("\u00fc.png", "u\u0308.png"):
        picture = Example(Path(spelling), "a dog", (64, 64))
        lots = [picture in split_heldout((*others, picture), 5, seed)[1] for seed in range(30)]
        assert any(lots)
        assert not all(lots)
        if spelling == "\u00fc.png":
            expected = lots
    assert lots == expected


@pytest.mark.parametrize("count", [3, 4])
def test_holding_out_every_picture_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match="heldout_images is . and there are 3 .* at most 2"):
        split_heldout(named(3), count, seed=0)


@pytest.mark.parametrize("change", ["pixels", "caption", "name", "count"])
def test_the_fingerprint_changes_with_all_that_is_trained(tmp_path: Path, change: str) -> None:
    first = Example(add_photo(tmp_path, "a.png", seed=1), "a dog", (90, 70))
    second = Example(add_photo(tmp_path, "b.png", seed=2), "a dog", (90, 70))
    before = fingerprint((first, second))
    assert fingerprint((first, second)) == before
    if change == "pixels":
        add_photo(tmp_path, "b.png", seed=3)
    elif change == "name":
        second = Example(second.path.rename(tmp_path / "c.png"), "a dog", (90, 70))
    elif change == "caption":
        second = Example(second.path, "a cat", (90, 70))
    after = (first,) if change == "count" else (first, second)
    assert fingerprint(after) != before


def disc(folder: Path, name: str, place: float) -> Path:
    """A wide photo with a red disc at a part of its width."""
    picture = Image.new("RGB", (300, 100), (90, 140, 200))
    x = round(300 * place)
    ImageDraw.Draw(picture).ellipse((x - 20, 30, x + 20, 70), fill=(200, 30, 40))
    picture.save(folder / name)
    return folder / name


def red_share(path: Path) -> float:
    pixels = np.asarray(images.load_upright(path), dtype=int)
    return float((pixels[..., 0] - pixels[..., 2] > 60).mean())


def test_the_subject_is_cut_out_and_not_the_middle(workspace: Workspace, photos: Path) -> None:
    disc(photos, "a.png", 0.85)
    (example,) = prepare_photos(workspace, photos).examples
    assert red_share(example.path) == pytest.approx(0.125, abs=0.02)
    (example,) = prepare_photos(workspace, photos, crop="centre", replace=True).examples
    assert red_share(example.path) == 0


def test_a_crop_chosen_by_hand_comes_before_the_subject(
    workspace: Workspace, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photo = disc(photos, "a.png", 0.85)
    session = prepare_photos(workspace, photos).session
    boxes.write_box(photo, session, (0, 0, 100, 100), (300, 100))
    (example,) = prepare_photos(workspace, photos, replace=True).examples
    assert red_share(example.path) == 0
    boxes.write_box(photo, session, (0, 0, 100, 100), (600, 200))
    (example,) = prepare_photos(workspace, photos, replace=True).examples
    assert red_share(example.path) > 0.1
    assert "the crop that was chosen for a.png is of a photo of 600 x 200" in caplog.text
