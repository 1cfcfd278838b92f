"""Photos made ready: upright, RGB, of the shape that training wants."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

from colabtools.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from PIL import Image

__all__ = ["PHOTO_SUFFIXES", "fit", "load_upright", "square", "upright_size"]

PHOTO_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

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


def load_upright(path: Path) -> Image.Image:
    """Return a photo as it is meant to be seen: all pixels decoded, turned by its EXIF tag, RGB.

    Transparent parts become white; greys of 16 bits and more are scaled to 8 bits. The picture is
    pixels alone: colour profile, EXIF and comments stay behind.

    Raises:
        ImageError: the file cannot be decoded to the end.
    """
    with _opened(path) as image:
        image.load()
        upright = _to_rgb(_turn(image))
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
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture for the block; what breaks in it is an ImageError of one line."""
    from PIL import Image

    try:
        # Pillow warns of large photos and of odd metadata; what matters here is that it decodes.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                yield image
    except Exception as error:  # decoders meet damage with whatever breaks first
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(
            f"{path.name} cannot be read as a picture ({reason}); "
            f"remove it from {path.parent} or replace it with a JPEG or PNG"
        ) from error


def _turn(image: Image.Image) -> Image.Image:
    from PIL import Image

    turn = _TURNS.get(_orientation(image))
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
        page = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(page, rgba).convert("RGB")
    return image.convert("RGB")


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


def square(image: Image.Image, size: int) -> Image.Image:
    """Return the centred square of a picture, `size` x `size` pixels, by one Lanczos resize."""
    return fit(image, size, size)


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return the largest centred part of a picture that has this shape, as `width` x `height`.

    The part has whole pixels of the picture's own resolution and is resized once (Lanczos).
    """
    from PIL import Image

    cut = [image.width, image.height]
    if image.width * height > image.height * width:
        cut[0] = max(1, round(image.height * width / height))
    else:
        cut[1] = max(1, round(image.width * height / width))
    # Whole pixels: half a pixel of shift would blur a picture that need not be resized.
    left, top = (image.width - cut[0]) // 2, (image.height - cut[1]) // 2
    box = (left, top, left + cut[0], top + cut[1])
    return image.resize((width, height), Image.Resampling.LANCZOS, box)
