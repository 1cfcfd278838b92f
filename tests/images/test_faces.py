from __future__ import annotations

import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from skimage import data

from colabtools.images import faces
from colabtools.images.crop import find_crop
from colabtools.images.faces import find_faces

# By eye: of the astronaut in scikit-image's photo.
FACE = (178, 65, 265, 175)


# What OpenCV does that matters to threads: while it is imported the module has no __spec__, and a
# cascade keeps the picture that it works on.
OPENCV = """
    import sys, threading, time
    from pathlib import Path

    spec, __spec__ = __spec__, None
    time.sleep(0.2)
    __spec__ = spec

    class data:
        haarcascades = str(Path(__file__).parent)

    class CascadeClassifier:
        def __init__(self, path):
            self.owner = threading.get_ident()

        def empty(self):
            return False

        def detectMultiScale(self, grey, *_, **__):
            assert threading.get_ident() == self.owner
            return [(1, 2, 3, 4)]
"""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces, "_of_thread", threading.local())


def test_a_face_is_found_where_it_is_at_any_size() -> None:
    photo = Image.fromarray(data.astronaut())
    for factor in (0.5, 1, 4):
        size = round(512 * factor)
        box, *_ = find_faces(photo.resize((size, size)))
        middle = ((box[0] + box[2]) / 2 / factor, (box[1] + box[3]) / 2 / factor)
        assert FACE[0] < middle[0] < FACE[2]
        assert FACE[1] < middle[1] < FACE[3]


def test_a_face_at_the_edge_stays_in_the_crop() -> None:
    person = Image.fromarray(data.astronaut()).crop((20, 10, 430, 512)).resize((246, 301))
    photo = Image.fromarray(data.coffee()).resize((910, 512))
    photo.paste(person, (910 - 246, 512 - 301))
    left, top, right, bottom = find_crop(photo, 64, 64, faces=find_faces(photo))
    # Of the pasted face.
    assert left <= 664 + 0.6 * (FACE[0] - 20)
    assert right >= 664 + 0.6 * (FACE[2] - 20)
    assert (top, bottom) == (0, 512)


def test_other_things_and_tiny_pictures_have_no_face() -> None:
    for picture in (data.coffee(), data.brick(), data.chelsea()):
        assert find_faces(Image.fromarray(picture)) == ()
    for size in ((1, 1), (3, 400), (24, 24), (20, 5000)):
        assert find_faces(Image.new("RGB", size, "pink")) == ()


def test_without_a_detector_there_are_no_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cv2", "skimage.data"):
        monkeypatch.setitem(sys.modules, name, None)
    assert find_faces(Image.fromarray(data.astronaut())) == ()


def test_threads_that_begin_together_find_one_detector_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cv2.py").write_text(textwrap.dedent(OPENCV))
    (tmp_path / "haarcascade_frontalface_default.xml").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    photos = [Image.new("RGB", (64, 64))] * 32
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(find_faces, photos))
    monkeypatch.delitem(sys.modules, "cv2")
    assert found == [((1, 2, 4, 6),)] * 32
