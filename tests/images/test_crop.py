"""Where a photo is cut: round its subject, whole pixels, always the size asked for."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from colabtools.images import cut, find_crop, fit


def scene(size: tuple[int, int], subject: tuple[int, int, int, int], seed: int = 0) -> Image.Image:
    """A blotched wall of two greens with a textured red thing in front of it."""
    random = np.random.default_rng(seed)
    values = random.normal((60, 110, 70), 9, (size[1], size[0], 3))
    values[: size[1] // 3] += (20, 25, 30)
    left, top, right, bottom = subject
    values[top:bottom, left:right] = random.normal(
        (190, 60, 50), 25, (bottom - top, right - left, 3)
    )
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("at", [0, 40, 170, 299])
@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 4)])
def test_the_subject_is_held_wherever_it_stands(
    at: int, upright: bool, shape: tuple[int, int]
) -> None:
    size, subject = (450, 200), (at, 60, at + 150, 190)
    if upright:
        size, subject, shape = size[::-1], (60, at, 190, at + 150), shape[::-1]
    box = find_crop(scene(size, subject), *shape)
    axis = 1 if upright else 0
    assert box[axis] <= subject[axis] + 4
    assert subject[axis + 2] - 4 <= box[axis + 2]


def test_a_subject_in_the_middle_is_put_in_the_middle() -> None:
    left, _, right, _ = find_crop(scene((600, 200), (250, 60, 350, 190)), 1, 1)
    assert abs((left + right) / 2 - 300) <= 6


@pytest.mark.parametrize("size", [(300, 100), (100, 300)])
def test_where_nothing_stands_out_the_middle_is_kept(size: tuple[int, int]) -> None:
    box = find_crop(Image.new("RGB", size, "grey"), 1, 1)
    assert box == ((100, 0, 200, 100) if size[0] == 300 else (0, 100, 100, 200))


def test_a_photo_of_that_shape_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    photo = scene((80, 80), (0, 0, 20, 20))
    monkeypatch.setattr(Image.Image, "resize", None)
    assert find_crop(photo, 1, 1) == (0, 0, 80, 80)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 900), (900, 1), (7, 5), (511, 513), (1023, 767), (2000, 3), (3, 400)]
)
@pytest.mark.parametrize("shape", [(64, 64), (80, 48), (640, 384)])
def test_any_photo_becomes_exactly_the_size_asked_for(
    size: tuple[int, int], shape: tuple[int, int]
) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    photo = Image.fromarray(noise)
    box = find_crop(photo, *shape)
    left, top, right, bottom = box
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]
    assert cut(photo, box, shape).size == shape


def test_the_found_part_is_as_large_as_the_centred_one() -> None:
    photo = scene((317, 200), (10, 20, 120, 180))
    left, top, right, bottom = find_crop(photo, 80, 48)
    centred = fit(photo, 80, 48)
    assert (right - left, bottom - top) == (317, 190)
    assert centred.size == cut(photo, (left, top, right, bottom), (80, 48)).size


def test_the_same_photo_is_always_cut_at_the_same_place() -> None:
    photo = scene((450, 200), (40, 60, 190, 190))
    assert len({find_crop(photo, 1, 1) for _ in range(3)}) == 1


@pytest.mark.parametrize("window", [(0, 0, 512, 341), (0, 171, 512, 512), (0, 0, 341, 512)])
def test_a_face_stays_in_the_picture(window: tuple[int, int, int, int]) -> None:
    data = pytest.importorskip("skimage.data")
    face = (174, 62, 272, 205)
    photo = Image.fromarray(data.astronaut()).crop(window)
    left, top, right, bottom = find_crop(photo, 1, 1)
    visible = [max(face[0] - window[0], 0), max(face[1] - window[1], 0)]
    visible += [min(face[2], window[2]) - window[0], min(face[3], window[3]) - window[1]]
    assert left <= visible[0]
    assert top <= visible[1]
    assert visible[2] <= right
    assert visible[3] <= bottom
