"""Crops chosen by hand: which part of a photo is kept, moved and scaled, and kept in a sidecar.

The sidecar of `dog.jpg` is `dog.crop.json`, with the box in pixels of the upright photo and the
photo's size: `{"box": [left, top, right, bottom], "size": [width, height]}`. One in the session's
`crops/` comes before one beside the photo; forms write the former, so photos are only read.
"""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING, TypeAlias

from colabtools.dreambooth.lease import ensure_held
from colabtools.errors import DatasetError
from colabtools.storage import patiently, workspace_error, write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from colabtools.dreambooth.session import Session

    Box: TypeAlias = tuple[int, int, int, int]
    Size: TypeAlias = tuple[int, int]

__all__ = ["fit_box", "move_box", "read_box", "remove_box", "scale_box", "write_box"]

_FOLDER, _SUFFIX = "crops", ".crop.json"
# Fewer pixels make no training picture.
_LEAST_PX = 16


def fit_box(box: Box, size: Size, shape: Size) -> Box:
    """The box of a shape's proportions that has a box's middle and, as nearly as can be, its area.

    Args:
        box: left, top, right, bottom in pixels.
        size: width and height of the photo, which it stays inside.
        shape: width and height of what the part will become.
    """
    area = max(1, (box[2] - box[0]) * (box[3] - box[1]))
    ratio = shape[0] / shape[1]
    # A box that has the proportions already keeps its sides to the pixel.
    wide = box[2] - box[0]
    if abs(wide - (box[3] - box[1]) * ratio) >= 1:
        wide = round((area * ratio) ** 0.5)
    return _around(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), wide, size, ratio)


def move_box(box: Box, size: Size, right: float, down: float) -> Box:
    """The box moved by these shares of its own sides, as far as the photo reaches."""
    wide, high = box[2] - box[0], box[3] - box[1]
    left = min(max(box[0] + _at_least_one(right * wide), 0), size[0] - wide)
    top = min(max(box[1] + _at_least_one(down * high), 0), size[1] - high)
    return left, top, left + wide, top + high


def scale_box(box: Box, size: Size, factor: float, shape: Size) -> Box:
    """The box of `shape`'s proportions about the same middle, its sides times `factor`."""
    wide = box[2] - box[0]
    scaled = wide + _at_least_one(wide * (factor - 1))
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    return _around(middle, scaled, size, shape[0] / shape[1])


def read_box(photo: Path, session: Session) -> tuple[Box, Size] | None:
    """The box chosen by hand for a photo and the photo's size then, or None.

    Raises:
        DatasetError: a sidecar holds no box.
        WorkspaceError: the storage failed.
    """
    for path in _sidecars(photo, session):
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except UnicodeDecodeError as error:
            raise _no_box(path, error) from error
        except OSError as error:
            # The photo's own suffix was shorter, and its name may be as long as can be.
            if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR):
                continue
            raise workspace_error("read", path, error) from error
        return _parse(path, text)
    return None


def write_box(photo: Path, session: Session, box: Box, size: Size) -> None:
    """Keep a box for a photo, read back and compared before this returns.

    Raises:
        DatasetError: it is no part of the photo, or another is read back.
        SessionBusyError: another runtime is writing to the session.
        WorkspaceError: the storage failed; the box is what it was.
    """
    data = json.dumps({"box": list(box), "size": list(size)}).encode()
    path = next(_sidecars(photo, session))
    _parse(path, data.decode())
    with session.writing("edit crops"):
        ensure_held(session.folder)
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise workspace_error("make", path.parent, error) from error
        write_atomic(path, data)

        def check() -> None:
            if read_box(photo, session) != (box, size):
                raise DatasetError(f"the box of {photo.name} reads back changed; look at {path}")

        patiently(check, path.parent)


def remove_box(photo: Path, session: Session) -> None:
    """Forget the box that `write_box` kept; one beside the photo stays.

    Raises:
        SessionBusyError: another runtime is writing to the session.
        WorkspaceError: the storage failed.
    """
    path = next(_sidecars(photo, session))
    with session.writing("edit crops"):
        ensure_held(session.folder)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise workspace_error("remove", path, error) from error


def _sidecars(photo: Path, session: Session) -> Iterator[Path]:
    name = f"{photo.stem}{_SUFFIX}"
    yield session.folder / _FOLDER / name
    yield photo.with_name(name)


def _around(middle: tuple[float, float], wide: int, size: Size, ratio: float) -> Box:
    """The box of these proportions about a middle, moved and shrunk until it is inside."""
    most = min(size[0], size[1] * ratio)
    least = min(most, max(_LEAST_PX, _LEAST_PX * ratio))
    width = max(1, round(min(max(wide, least), most)))
    height = max(1, min(size[1], round(width / ratio)))
    left = min(max(round(middle[0] - width / 2), 0), size[0] - width)
    top = min(max(round(middle[1] - height / 2), 0), size[1] - height)
    return left, top, left + width, top + height


def _at_least_one(change: float) -> int:
    """A change in whole pixels, of which any is at least one."""
    if change == 0:
        return 0
    return round(change) or (1 if change > 0 else -1)


def _parse(path: Path, text: str) -> tuple[Box, Size]:
    try:
        held = json.loads(text)
        left, top, right, bottom = map(_whole, held["box"])
        width, height = map(_whole, held["size"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _no_box(path, error) from error
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise _no_box(path, f"{held['box']} is no part of {width} x {height} pixels")
    return (left, top, right, bottom), (width, height)


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no whole number")
    return value


def _no_box(path: Path, why: object) -> DatasetError:
    return DatasetError(
        f"{path} holds no box ({why}); write "
        '{"box": [left, top, right, bottom], "size": [width, height]} or remove it'
    )
