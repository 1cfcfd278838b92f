"""Each photo by itself: can it be used, what is cut from it, and what should its owner know?"""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from colabtools import images
from colabtools.dreambooth.boxes import fit_box, read_box
from colabtools.dreambooth.buckets import bucket_shapes, bucket_step, nearest_bucket
from colabtools.errors import DatasetError, ImageError
from colabtools.report import get_logger
from colabtools.storage import patiently, sha256_of, workspace_error

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL import Image

    from colabtools.dreambooth.config import PrepareConfig
    from colabtools.dreambooth.session import Session

    Size: TypeAlias = tuple[int, int]

__all__ = [
    "THUMBNAIL_PX",
    "Cutting",
    "Photo",
    "ensure_any",
    "examine",
    "find_box",
    "name_twins",
    "pixels_digest",
]

THUMBNAIL_PX = 160
# The pixels of a larger one alone take 360 MB.
_MOST_PIXELS = 120_000_000
# A picture that is enlarged more than fourfold shows its own pixels, not the subject.
_MOST_ENLARGED = 4.0
_LEAST_SIDE_PX = 32
# Of a photo that is longer than this, no square holds enough.
_MOST_OBLONG = 8.0
# Grey levels of 255; chosen by eye on photos, and only hints.
_DARK, _BRIGHT = 40.0, 225.0
# Variance of the Laplacian at `_SHARPNESS_PX`. Source: J. L. Pech-Pacheco et al., Diatom
# autofocusing in brightfield microscopy, ICPR 2000; the threshold is ours.
_BLURRED = 25.0
_SHARPNESS_PX = 256
_SIGNATURE_PX = 8


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How photos become training pictures.

    Attributes:
        shapes: width and height in pixels of what may come out.
        crop: "subject" or "centre".
    """

    shapes: tuple[Size, ...]
    crop: str

    @classmethod
    def of(cls, config: PrepareConfig) -> Cutting:
        """Return what the settings ask for.

        Raises:
            ConfigError: the base model was not made for this resolution.
            ModelError: the base model is not known.
        """
        side = config.side
        shapes = bucket_shapes(side, bucket_step(side)) if config.buckets else ((side, side),)
        return cls(shapes=shapes, crop=config.crop)


@dataclass(frozen=True, kw_only=True)
class Photo:
    """What became of a photo.

    Attributes:
        path: the photo.
        stamp: bytes, time of the last change in ns, and all that decided what was cut from it.
        reason: why it is left out; empty where it is used.
        hints: what its owner should know, though it is used.
        size: width and height, upright; zeros where it cannot be decoded.
        box: the part that is kept: left, top, right, bottom in pixels of the upright photo.
        shape: width and height of the training picture.
        digest: SHA-256 of the file, in hexadecimal.
        pixels: SHA-256 of the training picture's size and pixels, in hexadecimal.
        perceptual: the photo's perceptual hash, 64 bits in hexadecimal.
        colours: 8 x 8 RGB pixels of the photo, in base64.
        thumbnail: a JPEG of the photo, in base64; `picture_thumbnail` one of what was cut.
        picture: where the training picture lies.
    """

    path: Path
    stamp: str
    reason: str = ""
    hints: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    shape: tuple[int, int] = (0, 0)
    digest: str = ""
    pixels: str = ""
    perceptual: str = ""
    colours: str = ""
    thumbnail: str = ""
    picture_thumbnail: str = ""
    picture: Path | None = field(default=None, compare=False)

    @property
    def area(self) -> int:
        """Pixels of the photo."""
        return self.size[0] * self.size[1]


def examine(
    path: Path, cutting: Cutting, session: Session, staging: Path, known: dict[str, Any] | None
) -> Photo:
    """Decode a photo, cut the training picture from it into a folder, and look at both.

    A photo that cannot be used comes back with the reason; nothing is raised for it.

    Args:
        path: the photo; it is only read.
        cutting: how it is cut.
        session: where a crop chosen by hand may be, and the pictures of the last time.
        staging: a folder of this machine.
        known: what was remembered of this photo, or None. Where nothing changed, the training
            picture that the session holds is taken.

    Raises:
        DatasetError: the sidecar with the crop that was chosen holds none.
        WorkspaceError: the storage failed.
    """
    chosen = read_box(path, session)
    stamp = _stamp(path, cutting, chosen)
    if known is not None and known.get("stamp") == stamp:
        again = _as_before(path, session, known)
        if again is not None:
            return again
    photo = Photo(path=path, stamp=stamp)
    try:
        size = images.upright_size(path)
        if reason := _unfit(size, cutting.shapes[0]):
            return replace(photo, size=size, reason=reason)
        upright = images.load_upright(path)
    except ImageError as error:
        return replace(photo, reason=str(error).removeprefix(f"{path.name} "))
    return _cut(replace(photo, size=upright.size), upright, cutting, chosen, staging)


def pixels_digest(picture: Image.Image) -> str:
    """The SHA-256 of a picture's size and pixels: a PNG's bytes change with who packs it."""
    digest = hashlib.sha256(f"{picture.width}x{picture.height}\0".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()


def _stamp(path: Path, cutting: Cutting, chosen: object) -> str:
    try:
        status = patiently(path.stat, path.parent)
    except OSError as error:
        raise workspace_error("read", path, error) from error
    parts = (status.st_size, status.st_mtime_ns, cutting, chosen)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _as_before(path: Path, session: Session, known: dict[str, Any]) -> Photo | None:
    """The photo as it was remembered, if the session still holds its picture unchanged."""
    picture = session.instance_images_dir / f"{path.stem}.png"
    try:
        fields = {name: _as_tuple(value) for name, value in known.items()}
        photo = Photo(path=path, picture=picture, **fields)
        whole = photo.pixels == pixels_digest(images.load_upright(picture))
    except (ImageError, TypeError):
        return None
    return photo if whole else None


def _as_tuple(value: Any) -> Any:
    """JSON knows no tuples."""
    return tuple(value) if isinstance(value, list) else value


def _unfit(size: Size, shape: Size) -> str:
    """Why a photo of this size makes no training picture; empty if it does."""
    short, long = sorted(size)
    text = f"{size[0]} x {size[1]} pixels"
    if short * long > _MOST_PIXELS:
        return f"{text} are more than {_MOST_PIXELS // 10**6} million; save it smaller"
    least = max(_LEAST_SIDE_PX, round(min(shape) / _MOST_ENLARGED))
    if short < least:
        return f"{text} are too few; the shorter side needs {least}"
    if long > _MOST_OBLONG * short:
        return f"{text} are too oblong; crop it to at most {_MOST_OBLONG:g} to 1"
    return ""


def _cut(
    photo: Photo, upright: Image.Image, cutting: Cutting, chosen: object, staging: Path
) -> Photo:
    """Cut the training picture from a decoded photo, store it on this machine, look at both."""
    import imagehash

    shape = nearest_bucket(*upright.size, cutting.shapes)
    box = _choose_box(photo.path, upright, shape, cutting.crop, chosen)
    picture = images.cut(upright, box, shape)
    stored = staging / f"{photo.path.stem}.png"
    try:
        picture.save(stored, format="PNG")
        digest = sha256_of(photo.path)
    except OSError as error:
        raise workspace_error("store a training picture in", staging, error) from error
    upright.thumbnail((2 * THUMBNAIL_PX, 2 * THUMBNAIL_PX))
    signature = upright.resize((_SIGNATURE_PX, _SIGNATURE_PX))
    return replace(
        photo,
        hints=_hints(picture, box, shape),
        box=box,
        shape=shape,
        digest=digest,
        pixels=pixels_digest(picture),
        perceptual=str(imagehash.phash(upright)),
        colours=base64.b64encode(signature.tobytes()).decode(),
        thumbnail=_jpeg(upright),
        picture_thumbnail=_jpeg(picture),
        picture=stored,
    )


def _choose_box(path: Path, photo: Image.Image, shape: Size, crop: str, chosen: Any) -> images.Box:
    """Return the part of a photo to keep: as chosen by hand, else where its subject is."""
    if chosen is not None and chosen[1] == photo.size:
        return fit_box(chosen[0], chosen[1], shape)
    if chosen is not None:
        get_logger(__name__).warning(
            "the crop that was chosen for %s is of a photo of %d x %d, and this one is %d x %d; "
            "it is left out",
            path.name,
            *chosen[1],
            *photo.size,
        )
    return find_box(photo, shape, crop)


def find_box(photo: Image.Image, shape: Size, crop: str) -> images.Box:
    """The part of an upright photo to keep where nobody chose one: left, top, right, bottom.

    Args:
        photo: RGB, of any size.
        shape: width and height of the training picture.
        crop: "subject" or "centre".
    """
    if crop == "centre":
        return images.centre_crop(photo, *shape)
    faces = images.find_faces(photo) if photo.width * shape[1] != photo.height * shape[0] else ()
    return images.find_crop(photo, *shape, faces=faces)


def _hints(picture: Image.Image, box: images.Box, shape: Size) -> tuple[str, ...]:
    """What is doubtful about a training picture, as far as pixels tell."""
    import numpy as np

    hints = []
    enlarged = shape[0] / max(1, box[2] - box[0])
    if enlarged > 1.25:
        hints.append(f"small: enlarged {enlarged:.1f} times")
    grey = picture.convert("L")
    brightness = float(np.asarray(grey).mean())
    if brightness < _DARK:
        hints.append("very dark")
    elif brightness > _BRIGHT:
        hints.append("very bright")
    if min(grey.size) >= _SHARPNESS_PX:
        scale = _SHARPNESS_PX / min(grey.size)
        small = grey.resize((round(grey.width * scale), round(grey.height * scale)))
        if _sharpness(np.asarray(small, dtype=np.float64)) < _BLURRED:
            hints.append("looks blurred")
    return tuple(hints)


def _sharpness(grey: Any) -> float:
    """The variance of the Laplacian of grey levels."""
    middle = grey[1:-1, 1:-1]
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * middle).var())


def _jpeg(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    packed = io.BytesIO()
    small.save(packed, format="JPEG", quality=85)
    return base64.b64encode(packed.getvalue()).decode()


def name_twins(paths: Sequence[Path]) -> dict[Path, str]:
    """The photos whose training picture another one of the same stem makes, with the reason."""
    first: dict[str, Path] = {}
    twins = {}
    for path in paths:
        if path.stem in first:
            twins[path] = f"called like {first[path.stem].name}; rename it to use both"
        else:
            first[path.stem] = path
    return twins


def ensure_any(photos: Sequence[Photo], folder: str) -> None:
    """Return if a photo can be used.

    Raises:
        DatasetError: none can; the first reason is given.
    """
    if all(photo.reason for photo in photos):
        raise DatasetError(
            f"none of the {len(photos)} photos in {folder!r} can be used; "
            f"{photos[0].path.name!r}: {photos[0].reason}"
        )
