"""Faces in a photo, where a detector that brings its own weights is installed; none otherwise."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from colabtools.images.crop import FaceBox

    _Detect: TypeAlias = Callable[[NDArray[np.uint8]], list[tuple[int, int, int, int]]]

__all__ = ["find_faces"]

# Of 256 to 512 pixels, steps of 1 to 2 and 3 to 5 neighbours these found every face of the people
# in benchmarks/crop.py and none in its pets and things; a photo takes a tenth of a second.
_SIDE_PX = 384
_LEAST_PX = 24
_NEIGHBOURS = 5

_loading = threading.Lock()
_of_thread = threading.local()


def find_faces(picture: Image.Image) -> tuple[FaceBox, ...]:
    """Return the boxes of frontal faces in pixels of the picture, the largest first.

    OpenCV before 5 and scikit-image bring weights along; without either there are no faces.

    Args:
        picture: upright, of any mode and size.
    """
    detect = _detector()
    if detect is None:
        return ()
    factor = max(1.0, max(picture.size) / _SIDE_PX)
    small = picture.reduce(int(factor)) if factor >= 2 else picture
    small = small.convert("L").resize(
        (max(1, round(picture.width / factor)), max(1, round(picture.height / factor)))
    )
    found = detect(np.asarray(small))
    across, down = picture.width / small.width, picture.height / small.height
    boxes = [
        (left * across, top * down, (left + width) * across, (top + height) * down)
        for left, top, width, height in found
    ]
    return tuple(sorted(boxes, key=lambda box: box[0] - box[2]))


def _detector() -> _Detect | None:
    """Return this thread's detector, of the first library that has one with weights."""
    # One each: OpenCV's cascade keeps the picture that it works on. Loaded one at a time: a thread
    # that looks at cv2 while another imports it finds half a module.
    if not hasattr(_of_thread, "detect"):
        with _loading:
            _of_thread.detect = _load_opencv() or _load_skimage()
    found: _Detect | None = _of_thread.detect
    return found


def _load_opencv() -> _Detect | None:
    """Return OpenCV's Haar cascade; OpenCV 5 has neither the class nor the file."""
    try:
        import cv2

        file = Path(cv2.data.haarcascades) / "haarcascade_frontalface_default.xml"
        cascade: Any = cv2.CascadeClassifier(str(file))
    except (AttributeError, ImportError, OSError):
        return None
    if not file.is_file() or cascade.empty():
        return None

    def detect(grey: NDArray[np.uint8]) -> list[tuple[int, int, int, int]]:
        least = (_LEAST_PX, _LEAST_PX)
        found = cascade.detectMultiScale(grey, 1.1, _NEIGHBOURS, minSize=least)
        return [(int(x), int(y), int(w), int(h)) for x, y, w, h in found]

    return detect


def _load_skimage() -> _Detect | None:
    """Return scikit-image's cascade of local binary patterns."""
    try:
        from skimage.data import lbp_frontal_face_cascade_filename
        from skimage.feature import Cascade

        cascade = Cascade(lbp_frontal_face_cascade_filename())
    except (AttributeError, ImportError, OSError):
        return None

    def detect(grey: NDArray[np.uint8]) -> list[tuple[int, int, int, int]]:
        if min(grey.shape) <= _LEAST_PX:
            return []
        found = cascade.detect_multi_scale(
            img=grey,
            scale_factor=1.2,
            step_ratio=1,
            min_size=(_LEAST_PX, _LEAST_PX),
            max_size=(min(grey.shape), min(grey.shape)),
            min_neighbor_number=_NEIGHBOURS,
        )
        return [(face["c"], face["r"], face["width"], face["height"]) for face in found]

    return detect
