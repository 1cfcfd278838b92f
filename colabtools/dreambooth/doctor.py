"""All photos together: which of them are the same picture, and what is told of each."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from colabtools.dreambooth.photos import THUMBNAIL_PX, Photo, ensure_any, examine, name_twins
from colabtools.dreambooth.tokens import TOKEN_LIMIT
from colabtools.errors import WorkspaceError
from colabtools.report import get_logger, progress, save_grid
from colabtools.storage import patiently, workspace_error, write_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL import Image

    from colabtools.dreambooth.photos import Cutting
    from colabtools.dreambooth.session import Session

__all__ = ["examine_all", "find_duplicates", "recall", "save_report", "save_sheet"]

# Photos of 12 megapixels take about 100 MB each while they are looked at.
_MOST_THREADS = 5
# Bits of 64 by which the perceptual hashes of a photo and its copy, packed again or scaled, may
# differ; photos that follow each other in a burst differ by more.
_NEAR_BITS = 5
# What looks alike in grey may differ in colour: mean difference of 8 x 8 RGB pixels, of 255.
_NEAR_COLOUR = 4.0
_MOST_ROWS = 48
_VERSION = 1
_REMEMBERED = tuple(
    field.name for field in fields(Photo) if field.name not in ("path", "picture", "reason")
)
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }}
table {{ border-collapse: collapse }}
td, th {{ padding: .5em 1em .5em 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #ddd }}
td {{ overflow-wrap: anywhere }}
.photo {{ position: relative; display: inline-block }}
.photo img {{ display: block }}
.box {{ position: absolute; box-sizing: border-box; border: 2px solid #e33;
  outline: 1px solid #fff }}
.out {{ background: #fbeceb }}
.reason {{ color: #a11 }}
.hint {{ color: #850 }}
</style></head><body>
<h1>{title}</h1>
<p>{summary}</p>
<table><tr><th>photo</th><th>training picture</th><th>file</th><th>prompt</th><th>tokens</th>
<th>remarks</th></tr>
{rows}
</table></body></html>
"""


def examine_all(
    paths: Sequence[Path], cutting: Cutting, session: Session, staging: Path
) -> tuple[Photo, ...]:
    """Look at all photos, in as many threads as there are cores, and return them in their order.

    Those that cannot be used, and all but one of those that show the same, have a reason.

    Raises:
        DatasetError: none can be used, or the sidecar of a crop holds none.
        WorkspaceError: the storage failed.
    """
    known = recall(session).get("photos", {})
    twins = name_twins(paths)

    def look(path: Path) -> Photo:
        if path in twins:
            return Photo(path=path, stamp="", reason=twins[path])
        before = known.get(path.name)
        return examine(path, cutting, session, staging, before)

    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="photos")
    try:
        with progress(
            pool.map(look, paths), total=len(paths), desc="preparing photos", unit="photos"
        ) as each:
            photos = list(each)
    finally:
        pool.shutdown(cancel_futures=True)
    photos = find_duplicates(photos)
    ensure_any(photos, str(paths[0].parent))
    for photo in photos:
        if photo.reason:
            get_logger(__name__).warning("left out %s: %s", photo.path.name, photo.reason)
    return tuple(photos)


def find_duplicates(photos: Sequence[Photo]) -> list[Photo]:
    """Return the photos, each one that shows what a larger or earlier one does with that reason.

    The same bytes are one photo, and so is what was packed again or scaled; what was cut
    otherwise, or taken a moment later, is another.
    """
    order = sorted(
        (at for at, photo in enumerate(photos) if not photo.reason),
        key=lambda at: (-photos[at].area, at),
    )
    found = list(photos)
    kept: list[tuple[int, Photo]] = []
    by_digest: dict[str, Photo] = {}
    for at in order:
        photo = photos[at]
        bits = int(photo.perceptual, 16)
        same = by_digest.get(photo.digest)
        near = None if same else _nearest(bits, photo, kept)
        if same is not None:
            found[at] = replace(photo, reason=f"the same file as {same.path.name}")
        elif near is not None:
            found[at] = replace(photo, reason=f"shows the same as {near.path.name}")
        else:
            by_digest[photo.digest] = photo
            kept.append((bits, photo))
    return found


def _nearest(bits: int, photo: Photo, kept: Sequence[tuple[int, Photo]]) -> Photo | None:
    for other_bits, other in kept:
        if (bits ^ other_bits).bit_count() <= _NEAR_BITS and _same_colours(photo, other):
            return other
    return None


def _same_colours(one: Photo, other: Photo) -> bool:
    pairs = zip(base64.b64decode(one.colours), base64.b64decode(other.colours), strict=True)
    differences = [abs(first - second) for first, second in pairs]
    return sum(differences) <= _NEAR_COLOUR * len(differences)


def recall(session: Session) -> dict[str, Any]:
    """Return what the last `prepare` remembered of photos and captions; empty where nothing is."""
    path = _memory(session)
    try:
        data = json.loads(patiently(path.read_bytes, path.parent))
    except (OSError, ValueError, RecursionError):
        return {}
    usable = isinstance(data, dict) and data.get("version") == _VERSION
    parts = ("photos", "captions")
    return data if usable and all(isinstance(data.get(part), dict) for part in parts) else {}


def _memory(session: Session) -> Path:
    return session.folder / ".cache" / "photos.json"


def save_report(
    session: Session,
    photos: Sequence[Photo],
    captions: dict[str, str],
    sources: dict[str, str],
    tokens: dict[str, int],
) -> Path:
    """Write what is told of each photo, as `logs/photos.json` and a page beside it; return that.

    Files that would not change are left alone.

    Args:
        session: where it goes.
        photos: all of them.
        captions: the final prompt of each used photo, by its stem.
        sources: the caption that came with each photo, before anybody edited it in the session.
        tokens: how many tokens each prompt has, where its tokenizer is at hand.

    Raises:
        WorkspaceError: the storage failed.
    """
    rows = [_describe(photo, captions, tokens) for photo in photos]
    remembered = {
        photo.path.name: {name: getattr(photo, name) for name in _REMEMBERED}
        for photo in photos
        if not photo.reason
    }
    memory = {"version": _VERSION, "photos": remembered, "captions": sources}
    page = _draw_page(session.name, photos, rows)
    target = session.logs_dir / "photos.html"
    files = {
        target: page.encode(),
        target.with_suffix(".json"): _pack({"version": _VERSION, "photos": rows}, indent=2),
        _memory(session): _pack(memory),
    }
    for path, data in files.items():
        _write_if_new(path, data)
    return target


def _pack(data: object, indent: int | None = None) -> bytes:
    return json.dumps(data, indent=indent).encode()


def _write_if_new(path: Path, data: bytes) -> None:
    try:
        if path.is_file() and path.read_bytes() == data:
            return
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise workspace_error("write", path, error) from error
    write_atomic(path, data)


def _describe(photo: Photo, captions: dict[str, str], tokens: dict[str, int]) -> dict[str, Any]:
    caption = None if photo.reason else captions.get(photo.path.stem)
    count = None if caption is None else tokens.get(caption)
    hints = list(photo.hints)
    if count is not None and count > TOKEN_LIMIT:
        hints.append(f"{count} tokens: the text encoder reads the first {TOKEN_LIMIT}")
    return {
        "photo": photo.path.name,
        "used": not photo.reason,
        "reason": photo.reason,
        "hints": hints,
        "size": list(photo.size),
        "box": list(photo.box),
        "picture_size": list(photo.shape),
        "sha256": photo.digest,
        "prompt": caption,
        "tokens": count,
    }


def _draw_page(name: str, photos: Sequence[Photo], rows: Sequence[dict[str, Any]]) -> str:
    used = sum(row["used"] for row in rows)
    summary = f"{used} of {len(rows)} photos are used"
    text = (_draw_row(photo, row) for photo, row in zip(photos, rows, strict=True))
    title = f"Photos of {name}"
    return _PAGE.format(title=html.escape(title), summary=summary, rows="\n".join(text))


def _draw_row(photo: Photo, row: dict[str, Any]) -> str:
    remarks = [f'<div class="hint">{html.escape(hint)}</div>' for hint in row["hints"]]
    if row["reason"]:
        remarks.insert(0, f'<div class="reason">{html.escape("left out: " + row["reason"])}</div>')
    size = photo.size
    cells = [
        _draw_thumbnail(photo.thumbnail, _draw_box(photo)),
        "" if photo.reason else _draw_thumbnail(photo.picture_thumbnail),
        html.escape(_printable(row["photo"]))
        + (f"<br>{size[0]} x {size[1]}" if photo.area else ""),
        html.escape(row["prompt"] or ""),
        "" if row["tokens"] is None else str(row["tokens"]),
        "".join(remarks),
    ]
    style = ' class="out"' if row["reason"] else ""
    return f"<tr{style}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _printable(name: str) -> str:
    """A file's name as UTF-8 can hold it."""
    return name.encode("utf-8", "replace").decode()


def _draw_box(photo: Photo) -> str:
    width, height = photo.size
    if photo.reason or not photo.area or photo.box == (0, 0, width, height):
        return ""
    left, top, right, bottom = photo.box
    sides = (
        ("left", left / width),
        ("top", top / height),
        ("width", (right - left) / width),
        ("height", (bottom - top) / height),
    )
    style = ";".join(f"{side}:{100 * share:.2f}%" for side, share in sides)
    return f'<div class="box" style="{style}"></div>'


def _draw_thumbnail(packed: str, over: str = "") -> str:
    if not packed:
        return ""
    image = f'<img alt="" src="data:image/jpeg;base64,{packed}">'
    return f'<div class="photo">{image}{over}</div>'


def save_sheet(photos: Sequence[Photo], captions: dict[str, str], path: Path) -> None:
    """Draw photos with the part that is kept beside what became of them, with their captions.

    Of many, the first 48 are drawn; the page of `save_report` has all.

    Raises:
        WorkspaceError: the picture cannot be stored.
    """
    used = [photo for photo in photos if not photo.reason][:_MOST_ROWS]
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise workspace_error("make", path.parent, error) from error
    save_grid(
        [[_framed(photo), _unpack(photo.picture_thumbnail)] for photo in used],
        path,
        row_titles=[f"{photo.path.stem}: {captions[photo.path.stem]}" for photo in used],
        column_titles=["photo", "training picture"],
        cell_size=THUMBNAIL_PX,
    )


def _unpack(packed: str) -> Image.Image:
    from PIL import Image

    try:
        return Image.open(io.BytesIO(base64.b64decode(packed))).convert("RGB")
    except (OSError, ValueError) as error:
        raise WorkspaceError(f"a small picture cannot be read ({error}); prepare again") from error


def _framed(photo: Photo) -> Image.Image:
    """The small photo with a red line about the part that is kept, if that is not all of it."""
    from PIL import ImageDraw

    small = _unpack(photo.thumbnail)
    if photo.box != (0, 0, *photo.size):
        across, down = small.width / photo.size[0], small.height / photo.size[1]
        left, top, right, bottom = photo.box
        corners = (left * across, top * down, right * across - 1, bottom * down - 1)
        ImageDraw.Draw(small).rectangle(corners, outline=(230, 40, 40), width=2)
    return small
