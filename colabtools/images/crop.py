"""The part of a photo that is kept: the window of the wanted shape that holds the subject.

What looks like the photo's border is background. The colours at the border are grouped, each pixel
is as remarkable as it is far from the nearest group, and of all windows of the wanted shape that
are as large as can be, the one with the most remarkable pixels is kept. numpy and Pillow only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    Floats: TypeAlias = npt.NDArray[np.float32]

__all__ = ["Box", "FaceBox", "centre_crop", "cut", "find_crop", "fit", "square"]

Box: TypeAlias = "tuple[int, int, int, int]"  # left, top, right, bottom in pixels
FaceBox: TypeAlias = "tuple[float, float, float, float]"  # the same, and not in whole pixels

# Side of the picture that is searched. More pixels find nothing else and cost time.
_SEARCHED_PX = 96
_BORDER_PX = 3
_GROUPS = 6
_ROUNDS = 8
# A colour that is rare at the border is rather a subject that reaches it: up to this much distance
# (CIE L*a*b*) is added for one, which falls off with its share of the border.
_RARE, _RARE_SHARE = 6.0, 0.1
# What is twice as far from the border's colours counts nearly three times as much.
_CONTRAST = 1.5
# What the outermost window costs against the middle one, and how near to the best another is as
# good, in parts of all that is remarkable.
_CENTRE_BONUS = _NEAR = 0.02
# A face counts as much as this part of all that is remarkable. More keeps no more faces in, and
# detectors see faces in one of twenty pictures that have none.
_FACE = 0.12


def square(image: Image.Image, size: int) -> Image.Image:
    """Return the centred square of a picture, `size` x `size` pixels, by one Lanczos resize."""
    return fit(image, size, size)


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return the largest centred part of a picture that has this shape, as `width` x `height`."""
    return cut(image, centre_crop(image, width, height), (width, height))


def centre_crop(image: Image.Image, width: int, height: int) -> Box:
    """Return the largest centred part of a picture that has the shape of `width` : `height`.

    It has whole pixels: half a pixel of shift would blur a picture that need not be resized.
    """
    part = _largest(image.size, width / height)
    return _at(part, (image.width - part[0]) // 2, (image.height - part[1]) // 2)


def cut(image: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """Return a part of a picture as `size` pixels, by one Lanczos resize."""
    from PIL import Image

    return image.resize(size, Image.Resampling.LANCZOS, box)


def find_crop(image: Image.Image, width: int, height: int, *, faces: Sequence[FaceBox] = ()) -> Box:
    """Return the part of an RGB picture to keep for a shape of `width` : `height`.

    It is the largest that has this shape, so it can move in one direction only, and is put where it
    holds most of the subject. Where nothing stands out, or nothing can move, it is centred.

    Args:
        image: upright.
        width: of the shape.
        height: of the shape.
        faces: boxes in pixels; each weighs as much as an eighth of all that stands out.
    """
    part = _largest(image.size, width / height)
    rooms = (image.width - part[0], image.height - part[1])
    if max(rooms) == 0:
        return _at(part, 0, 0)
    along = 0 if rooms[0] else 1
    share = part[along] / image.size[along]
    profile = _profile(image, along)
    profile = profile + _faces_profile(len(profile), image.size[along], faces, along) * (
        max(float(profile.sum()), 1.0)
    )
    start = round(_best_start(profile, share) * image.size[along])
    start = min(max(start, 0), rooms[along])
    return _at(part, start, 0) if along == 0 else _at(part, 0, start)


def _largest(size: tuple[int, int], ratio: float) -> tuple[int, int]:
    width, height = size
    if width > height * ratio:
        return max(1, min(width, round(height * ratio))), height
    return width, max(1, min(height, round(width / ratio)))


def _at(part: tuple[int, int], left: int, top: int) -> Box:
    return left, top, left + part[0], top + part[1]


def _profile(image: Image.Image, along: int) -> Floats:
    """Return how remarkable each column is, or each row where `along` is 1."""
    lab = _small_lab(image)
    if along:
        lab = lab.swapaxes(0, 1)
    sums: Floats = _remarkable(lab).sum(axis=0)
    return sums


def _faces_profile(count: int, length: int, faces: Sequence[FaceBox], along: int) -> Floats:
    """Return how much of the faces is in each of `count` columns or rows, all else being 1."""
    import numpy as np

    edges = np.linspace(0, length, count + 1)
    held = np.zeros(count, dtype=np.float32)
    for face in faces:
        begin, end = face[along], face[along + 2]
        covered = np.minimum(edges[1:], end) - np.maximum(edges[:-1], begin)
        held += _FACE * covered.clip(0) / max(end - begin, 1.0)
    return held


def _small_lab(image: Image.Image) -> Floats:
    """Return the picture at no more than 96 pixels a side: (h, w, 3) L*a*b*."""
    import numpy as np
    from PIL import Image

    scale = min(1.0, _SEARCHED_PX / max(image.size))
    small = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # `reducing_gap` of 2 averages whole blocks first, which costs a fifth and is as good here.
    shrunk = image.resize(small, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return _lab(np.asarray(shrunk))


def _lab(rgb: npt.NDArray[np.uint8]) -> Floats:
    """Return sRGB of 8 bits as CIE L*a*b*. Source: IEC 61966-2-1 and CIE 15:2004, D65."""
    import numpy as np

    steps = np.arange(256, dtype=np.float32) / 255
    linear = np.where(steps <= 0.04045, steps / 12.92, ((steps + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]],
        dtype=np.float32,
    )
    xyz = linear.astype(np.float32)[rgb] @ (to_xyz / to_xyz.sum(axis=1, keepdims=True)).T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    from_f = np.array([[0, 116, 0], [500, -500, 0], [0, 200, -200]], dtype=np.float32)
    lab: Floats = f.astype(np.float32) @ from_f.T - np.array([16, 0, 0], dtype=np.float32)
    return lab


def _remarkable(lab: Floats) -> Floats:
    """Return how far each pixel is from the colours of the border: (h, w)."""
    import numpy as np

    n = _BORDER_PX
    edges = [lab[:n], lab[-n:], lab[:, :n], lab[:, -n:]]
    border = np.concatenate([edge.reshape(-1, 3) for edge in edges])
    centres, shares = _group(border)
    extra = _RARE * np.exp(-shares / _RARE_SHARE)
    nearest = (_distances(lab.reshape(-1, 3), centres) + extra).min(axis=1)
    counted: Floats = ((nearest - nearest.min()) ** _CONTRAST).reshape(lab.shape[:2])
    return counted


def _distances(colours: Floats, centres: Floats) -> Floats:
    """Return the distance of each colour to each centre: (N, K)."""
    import numpy as np

    squares = (colours**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1)
    found: Floats = np.sqrt(np.maximum(squares - 2 * colours @ centres.T, 0))
    return found


def _group(colours: Floats) -> tuple[Floats, Floats]:
    """Return the centres of up to six groups of colours, and the share of each (k-means).

    The first centres are each the colour farthest from those before, so nothing is left to chance.
    """
    import numpy as np

    centres = colours.mean(axis=0)[None]
    away = _distances(colours, centres).min(axis=1)
    while len(centres) < _GROUPS:
        centres = np.concatenate([centres, colours[away.argmax()][None]])
        away = np.minimum(away, _distances(colours, centres[-1:])[:, 0])
    for _ in range(_ROUNDS):
        nearest = _distances(colours, centres).argmin(axis=1)
        members = (nearest[:, None] == np.arange(_GROUPS)).astype(np.float32)
        counts = members.sum(axis=0)
        filled = counts > 0
        centres[filled] = (members.T @ colours)[filled] / counts[filled, None]
    return centres[filled], counts[filled] / np.float32(len(colours))


def _best_start(profile: Floats, share: float) -> float:
    """Return where the window begins that holds most of a profile, as a share of its length."""
    import numpy as np

    room = 1 - share
    whole = float(profile.sum())
    if whole <= 0:
        return room / 2
    sums = np.concatenate([[0.0], np.cumsum(profile)]) / whole
    places = np.arange(len(sums)) / len(profile)
    starts = np.linspace(0, room, 2 * len(profile) + 1)
    held = np.interp(starts + share, places, sums) - np.interp(starts, places, sums)
    held = held - _CENTRE_BONUS * np.linspace(-1, 1, len(starts)) ** 2
    # Only the run of places around the best: the middle between two subjects holds neither.
    first = last = int(held.argmax())
    good = held >= held[first] - _NEAR
    while first > 0 and good[first - 1]:
        first -= 1
    while last < len(starts) - 1 and good[last + 1]:
        last += 1
    return float(starts[first] + starts[last]) / 2
