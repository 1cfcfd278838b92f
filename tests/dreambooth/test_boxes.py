"""Crops by hand: boxes stay inside the photo and keep their proportions, and sidecars hold them."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path
from typing import Any

import pytest

from colabtools import drive
from colabtools.dreambooth.boxes import (
    fit_box,
    move_box,
    read_box,
    remove_box,
    scale_box,
    write_box,
)
from colabtools.dreambooth.session import Session, create_session
from colabtools.errors import DatasetError, WorkspaceError

SIZE = (300, 200)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return create_session(drive.Workspace(tmp_path), "dog")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos" / "dog 犬.v2.jpg"


def test_a_move_goes_by_shares_of_the_box_and_stops_at_the_edge() -> None:
    box = (50, 0, 250, 200)
    assert move_box(box, SIZE, 0.1, 0) == (70, 0, 270, 200)
    assert move_box(box, SIZE, -0.5, 0.3) == (0, 0, 200, 200)
    assert move_box((0, 0, 20, 20), SIZE, 0.001, 0.001) == (1, 1, 21, 21)
    assert move_box(box, SIZE, 0, 0) == box


def test_scaling_keeps_the_middle_and_the_proportions() -> None:
    box = (100, 50, 200, 150)
    assert scale_box(box, SIZE, 0.8, (64, 64)) == (110, 60, 190, 140)
    assert scale_box(box, SIZE, 1.2, (64, 64)) == (90, 40, 210, 160)
    assert scale_box(box, SIZE, 9, (64, 64)) == (50, 0, 250, 200)
    assert scale_box(box, SIZE, 0.01, (64, 64)) == (142, 92, 158, 108)


def test_a_box_takes_the_proportions_of_another_shape() -> None:
    assert fit_box((50, 0, 250, 200), SIZE, (512, 512)) == (50, 0, 250, 200)
    assert fit_box((100, 50, 200, 150), SIZE, (2, 1)) == (80, 65, 221, 135)
    # Whole pixels only come near some proportions; such a box is kept as it is.
    assert fit_box((0, 0, 199, 133), SIZE, (96, 64)) == (0, 0, 199, 133)


def test_no_row_of_nudges_leaves_the_photo_or_bends_the_box() -> None:
    chance = random.Random(0)
    for _ in range(200):
        size = (chance.randint(20, 400), chance.randint(20, 400))
        shape = chance.choice([(64, 64), (96, 64), (64, 128), (512, 448)])
        box = fit_box((0, 0, *size), size, shape)
        for _ in range(30):
            if chance.random() < 0.5:
                box = move_box(box, size, chance.uniform(-1, 1), chance.uniform(-1, 1))
            else:
                box = scale_box(box, size, chance.choice([0.5, 0.95, 1.05, 2]), shape)
            left, top, right, bottom = box
            assert 0 <= left < right <= size[0]
            assert 0 <= top < bottom <= size[1]
            assert abs((right - left) - (bottom - top) * shape[0] / shape[1]) <= 2


def test_a_kept_box_is_in_the_session_and_read_back(session: Session, photo: Path) -> None:
    assert read_box(photo, session) is None
    write_box(photo, session, (10, 0, 210, 200), SIZE)
    path = session.folder / "crops" / "dog 犬.v2.crop.json"
    assert json.loads(path.read_text()) == {"box": [10, 0, 210, 200], "size": [300, 200]}
    assert read_box(photo, session) == ((10, 0, 210, 200), SIZE)
    assert list(photo.parent.iterdir()) == []


def test_one_beside_the_photo_serves_until_one_is_kept(session: Session, photo: Path) -> None:
    beside = photo.with_name("dog 犬.v2.crop.json")
    beside.write_text('{"box": [0, 0, 200, 200], "size": [300, 200]}')
    assert read_box(photo, session) == ((0, 0, 200, 200), SIZE)
    write_box(photo, session, (9, 0, 209, 200), SIZE)
    assert read_box(photo, session) == ((9, 0, 209, 200), SIZE)
    remove_box(photo, session)
    assert read_box(photo, session) == ((0, 0, 200, 200), SIZE)
    remove_box(photo, session)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"box": [0, 0, 2]}',
        '{"box": [0, 0, 2, 2]}',
        '{"box": [0, 0, 2.5, 2], "size": [3, 3]}',
        '{"box": [0, 0, true, 2], "size": [3, 3]}',
        '{"box": [2, 0, 1, 2], "size": [3, 3]}',
        '{"box": [0, 0, 4, 2], "size": [3, 3]}',
        '{"box": [-1, 0, 2, 2], "size": [3, 3]}',
        "[" * 100_000,
    ],
)
def test_what_is_no_box_is_refused_with_one_that_would_be(
    session: Session, photo: Path, text: str
) -> None:
    photo.with_name("dog 犬.v2.crop.json").write_text(text)
    with pytest.raises(DatasetError, match=r"holds no box .*write .*left, top, right, bottom"):
        read_box(photo, session)


def test_a_box_outside_the_photo_is_not_kept(session: Session, photo: Path) -> None:
    with pytest.raises(DatasetError, match="is no part of 300 x 200"):
        write_box(photo, session, (0, 0, 301, 200), SIZE)
    assert read_box(photo, session) is None


def test_a_name_as_long_as_can_be_has_no_box(session: Session, photo: Path) -> None:
    assert read_box(photo.with_name("é" * 125 + ".jpg"), session) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ENOTCONN])
def test_a_failing_drive_leaves_the_former_box(flaky: Any, photo: Path, number: int) -> None:
    session = create_session(drive.Workspace(flaky.root), "dog")
    write_box(photo, session, (0, 0, 200, 200), SIZE)
    with session.writing("test"):
        flaky.fail("write", number)
        with pytest.raises(WorkspaceError):
            write_box(photo, session, (50, 0, 250, 200), SIZE)
        flaky.recover()
    assert read_box(photo, session) == ((0, 0, 200, 200), SIZE)
