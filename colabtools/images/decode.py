"""Any photo as pixels: decoded to the end, the right way up, RGB."""

from __future__ import annotations

import io
import warnings
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, NamedTuple

from colabtools.errors import ImageError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

__all__ = ["PHOTO_SUFFIXES", "Encoded", "load_upright", "upright_size"]

PHOTO_SUFFIXES = frozenset(
    {
        *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpeg", ".jpg", ".mpo"),
        *(".png", ".tif", ".tiff", ".webp"),
    }
)
# Pillow has AVIF itself since 11.3, and leaves these to the plugin pillow-heif.
_HEIF_SUFFIXES = frozenset({".heic", ".heif"})

# Photos of a camera's full size are soft at the scale of a pixel. Those of a megapixel were made
# smaller and are sharp; decoded at a half they differ by up to 35 of 255 from a smooth reduction,
# and to decode them whole takes 15 ms.
_DRAFT_LEAST_PX = 6_000_000

# What undoes each value of the EXIF tag Orientation, as names of `PIL.Image.Transpose`.
# Source: EXIF 2.32, tag 0x0112, and PIL.ImageOps.exif_transpose, which is not called because it
# also rewrites the other tags and fails where one of them is damaged.
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
# Those that exchange width and height.
_SIDEWAYS = frozenset({5, 6, 7, 8})


class Encoded(NamedTuple):
    """A photo's file that lies in memory, such as a member of an archive, and its name."""

    name: str
    data: bytes


def load_upright(photo: Path | Encoded, *, draft: tuple[int, int] | None = None) -> Image.Image:
    """Return a photo as it is meant to be seen: all pixels decoded, turned by its EXIF tag, RGB.

    Transparent parts take the colour of the border where most of that is opaque, else white; greys
    of 16 bits and more are scaled to 8 bits. The picture is pixels alone: colour profile, EXIF and
    comments stay behind.

    Args:
        photo: a file, on disk or in memory.
        draft: width and height in pixels, upright, that are enough: a JPEG of 6 megapixels and
            more is then decoded at a half, a quarter or an eighth of its size if that is no less,
            for a fraction of the work.

    Raises:
        ImageError: the file cannot be decoded to the end.
    """
    with _opened(photo) as image:
        if draft is not None and image.width * image.height >= _DRAFT_LEAST_PX:
            sideways = _orientation(image) in _SIDEWAYS
            image.draft(None, draft[::-1] if sideways else draft)
        image.load()
        upright = _turn(_to_rgb(image), _orientation(image))
    upright.info = {}
    return upright


def upright_size(path: Path) -> tuple[int, int]:
    """Return width and height of a photo as `load_upright` gives it, from the file's head alone.

    Raises:
        ImageError: the head cannot be read; damage further on may not be seen.
    """
    with _opened(path) as image:
        if image.format == "TIFF":  # which Pillow turns by itself, but only when it decodes
            image.load()
        width, height = image.size
        sideways = _orientation(image) in _SIDEWAYS
    return (height, width) if sideways else (width, height)


@contextmanager
def _opened(photo: Path | Encoded) -> Iterator[Image.Image]:
    """Open a picture for the block; what breaks in it is an ImageError of one line."""
    from PIL import Image

    path = PurePath(photo.name) if isinstance(photo, Encoded) else photo
    file = io.BytesIO(photo.data) if isinstance(photo, Encoded) else photo
    try:
        _add_heif(path)
        # Pillow warns of large photos and of odd metadata; what matters here is that it decodes.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                yield image
    except MissingDependencyError as error:
        raise ImageError(f"{_shown(path.name)} cannot be read as a picture ({error})") from error
    except Exception as error:  # decoders meet damage with whatever breaks first
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(
            f"{_shown(path.name)} cannot be read as a picture ({reason}); "
            f"remove it from {path.parent} or replace it with a JPEG or PNG"
        ) from error


def _add_heif(path: PurePath) -> None:
    """Teach Pillow to read HEIC where a file is one; a second time costs nothing.

    Raises:
        MissingDependencyError: pillow-heif is not installed.
    """
    if path.suffix.lower() not in _HEIF_SUFFIXES:
        return
    try:
        import pillow_heif
    except ImportError as error:
        raise MissingDependencyError(
            "HEIC photos need pillow-heif: pip install pillow-heif"
        ) from error
    pillow_heif.register_heif_opener()


def _shown(name: str) -> str:
    """Return a file's name on one line, as a file system may hold it on several."""
    return name if name.isprintable() else repr(name)


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    from PIL import Image

    turn = _TURNS.get(orientation)
    return image.transpose(Image.Transpose[turn]) if turn else image


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 0 where there is none."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # damaged EXIF spoils no pixel
        return 0
    return orientation if isinstance(orientation, int) else 0


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        return _wide_grey(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        page = Image.new("RGBA", rgba.size, _border_colour(rgba))
        return Image.alpha_composite(page, rgba).convert("RGB")
    # Without the copy that `convert` makes of what is RGB: 36 MB for a photo of 12 megapixels.
    return image if image.mode == "RGB" else image.convert("RGB")


def _border_colour(rgba: Image.Image) -> tuple[int, int, int]:
    """Return the median colour of the opaque border, or white where most is transparent."""
    import numpy as np

    values = np.asarray(rgba)
    edges = [values[:1], values[-1:], values[:, :1], values[:, -1:]]
    border = np.concatenate([edge.reshape(-1, 4) for edge in edges])
    opaque = border[border[:, 3] > 127]
    if 2 * len(opaque) <= len(border):
        return 255, 255, 255
    red, green, blue = (int(value) for value in np.median(opaque[:, :3], axis=0))
    return red, green, blue


def _wide_grey(image: Image.Image) -> Image.Image:
    """Return a grey picture of 16 bits or more in 8.

    Only the 16-bit modes say what white is. For 32-bit numbers it is the smallest of the usual
    values, 1 (fractions only), 255 and 65535, that the brightest pixel does not exceed.
    """
    import numpy as np
    from PIL import Image

    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    brightest = float(values.max(initial=0.0))
    usual = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(image.mode, (65535.0,))
    white = next((level for level in usual if brightest <= level), brightest)
    scaled = np.rint(values * (255.0 / white)).clip(0, 255)
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
