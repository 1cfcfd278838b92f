"""The crop viewer: a box that is nudged stays in its photo, is saved, and comes back."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from colabtools import env, images
from colabtools.dreambooth.config import PrepareConfig
from colabtools.dreambooth.dataset import prepare
from colabtools.dreambooth.session import Session
from colabtools.dreambooth.widgets import CropViewer, edit_crops
from colabtools.drive import Workspace
from colabtools.errors import DatasetError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A wide photo, a tall one and a square one, of one colour, so that their middle is kept."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in (("a wide", (600, 400)), ("b tall", (300, 500)), ("c square", (200, 200))):
        Image.new("RGB", size, "navy").save(folder / f"{name}.png")
    return folder


@pytest.fixture
def viewer(session: Session, photos: Path) -> CropViewer:
    return CropViewer(session, PrepareConfig(images=str(photos)))


def kept(session: Session, stem: str) -> dict[str, list[int]]:
    return json.loads((session.folder / "crops" / f"{stem}.crop.json").read_text())


def pictures(viewer: CropViewer) -> tuple[Image.Image, Image.Image]:
    whole, result = viewer.form.children[2].children
    return Image.open(io.BytesIO(whole.value)), Image.open(io.BytesIO(result.value))


def test_it_shows_the_box_that_was_found(viewer: CropViewer) -> None:
    assert viewer.box == (100, 0, 500, 400)
    whole, result = pictures(viewer)
    assert whole.size == (360, 240)
    # The line round what is kept, and what is left out, dimmed.
    assert whole.getpixel((60, 100)) == (255, 64, 129)
    assert whole.getpixel((10, 100)) == (153, 153, 204)
    assert whole.getpixel((180, 100)) == (0, 0, 128)
    assert result.size == (192, 192)
    assert "as found" in viewer.state


def test_a_small_photo_is_shown_large(session: Session, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    Image.new("RGB", (64, 32), "navy").save(tmp_path / "small" / "dog.png")
    viewer = CropViewer(session, PrepareConfig(images=str(tmp_path / "small")))
    assert pictures(viewer)[0].size == (360, 180)
    assert viewer.box == (16, 0, 48, 32)


def test_a_nudge_is_saved_and_there_the_next_time(
    viewer: CropViewer, session: Session, photos: Path
) -> None:
    viewer.move(1, 0)
    assert viewer.box == (120, 0, 520, 400)
    assert kept(session, "a wide") == {"box": [120, 0, 520, 400], "size": [600, 400]}
    assert "✓ saved; the file holds: 400 x 400 pixels from (120, 0)" in viewer.state
    again = CropViewer(session, PrepareConfig(images=str(photos)))
    assert again.box == viewer.box
    assert "chosen by hand" in again.state
    assert {path.suffix for path in photos.iterdir()} == {".png"}


def test_closer_and_wider_keep_the_shape(viewer: CropViewer, session: Session) -> None:
    viewer.step.value = 0.2
    viewer.scale(-1)
    assert viewer.box == (140, 40, 460, 360)
    viewer.scale(1)
    viewer.scale(1)
    viewer.scale(1)
    assert viewer.box[3] - viewer.box[1] == viewer.box[2] - viewer.box[0] == 400
    assert kept(session, "a wide")["box"] == list(viewer.box)


def test_at_the_edge_it_says_so_and_saves_nothing(viewer: CropViewer, session: Session) -> None:
    viewer.move(0, -1)
    assert "the photo ends here" in viewer.state
    assert not (session.folder / "crops").exists()


def test_one_goes_no_further_than_the_first_and_the_last(viewer: CropViewer) -> None:
    buttons = {each.description: each for each in viewer.form.children[3].children}
    ends = []
    for _ in range(3):
        ends.append((buttons["Previous"].disabled, buttons["Next"].disabled))
        buttons["Next"].click()
    assert ends == [(True, False), (False, False), (False, True)]
    assert "3 of 3: c square.png, kept 200 x 200 pixels from (0, 0) of 200 x 200" in (
        viewer.form.children[1].value
    )


def test_as_found_forgets_the_box(viewer: CropViewer, session: Session) -> None:
    found = viewer.box
    viewer.move(1, 0)
    viewer.reset()
    assert viewer.box == found
    assert "as found" in viewer.state
    assert list((session.folder / "crops").iterdir()) == []


def test_with_buckets_a_box_has_the_shape_of_its_bucket(session: Session, photos: Path) -> None:
    viewer = CropViewer(session, PrepareConfig(images=str(photos), buckets=True))
    left, top, right, bottom = viewer.box
    assert (right - left) / (bottom - top) == pytest.approx(80 / 48, abs=0.02)


def test_a_pause_saves_once_and_moving_on_saves_at_once(
    session: Session, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from colabtools.dreambooth import boxes
    from colabtools.dreambooth.widgets import crops

    saved: list[object] = []

    def count(photo: Path, *rest: object) -> None:
        saved.append((photo.stem, rest[1]))
        boxes.write_box(photo, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(crops, "write_box", count)

    async def nudge() -> None:
        viewer = CropViewer(session, PrepareConfig(images=str(photos)))
        for _ in range(3):
            viewer.move(1, 0)
        assert saved == []
        viewer.select(1)
        assert saved == [("a wide", (160, 0, 560, 400))]
        viewer.move(0, 1)
        await asyncio.sleep(0.8)
        assert len(saved) == 2

    asyncio.run(nudge())
    assert kept(session, "b tall")["size"] == [300, 500]


def test_a_box_of_another_photo_of_that_name_is_not_used(
    viewer: CropViewer, session: Session, photos: Path
) -> None:
    viewer.move(1, 0)
    Image.new("RGB", (100, 50)).save(photos / "a wide.png")
    again = CropViewer(session, PrepareConfig(images=str(photos)))
    assert again.box == (25, 0, 75, 50)
    assert "was of a photo of 600 x 400 pixels" in again.state


@pytest.mark.parametrize("crop", ("subject", "centre"))
def test_what_it_shows_before_a_nudge_is_what_prepare_keeps(
    workspace: Workspace, tmp_path: Path, crop: str
) -> None:
    folder = tmp_path / "one photo"
    folder.mkdir()
    photo = Image.new("RGB", (600, 400), "white")
    photo.paste("red", (10, 150, 90, 250))
    photo.save(folder / "dog.png")
    config = PrepareConfig(images=str(folder), crop=crop)
    prepared = prepare(workspace, f"by {crop}", config)
    viewer = CropViewer(prepared.session, config)
    (example,) = prepared.examples
    shown = images.cut(photo, viewer.box, example.size)
    assert shown.tobytes() == images.load_upright(example.path).tobytes()


def test_the_faces_that_prepare_keeps_are_kept_here(
    session: Session, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "find_faces", lambda _picture: ((0, 100, 80, 180),))
    viewer = CropViewer(session, PrepareConfig(images=str(photos)))
    # Of one colour, the middle would be kept.
    assert viewer.box[0] < 10


def test_a_damaged_photo_or_sidecar_is_told_and_the_others_serve(
    viewer: CropViewer, session: Session, photos: Path
) -> None:
    (photos / "a wide.png").write_bytes(b"no picture")
    (photos / "b tall.crop.json").write_text("no box")
    again = CropViewer(session, PrepareConfig(images=str(photos)))
    assert "✗" in again.state
    again.move(1, 0)
    again.select(1)
    assert "holds no box" in again.state
    again.select(2)
    assert again.box == (0, 0, 200, 200)


def test_a_folder_without_photos_is_told(session: Session, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no photos in"):
        CropViewer(session, PrepareConfig(images=str(tmp_path / "empty")))


def test_where_nobody_looks_crops_stay(
    workspace: Workspace, papermill: env.Probes, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_crops(workspace, "dog", PrepareConfig(images="demo"), probes=papermill)
    line = "no form is shown here (headless): crops stay as they were found\n"
    assert capsys.readouterr().err == line
