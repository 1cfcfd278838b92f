"""The crop viewer: which part of each photo is kept, and buttons that move and scale it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colabtools import images, micro
from colabtools.dreambooth.boxes import (
    fit_box,
    move_box,
    read_box,
    remove_box,
    scale_box,
    write_box,
)
from colabtools.dreambooth.buckets import nearest_bucket
from colabtools.dreambooth.photos import Cutting, find_box
from colabtools.dreambooth.session import create_session
from colabtools.dreambooth.widgets import frame
from colabtools.errors import ColabToolsError, DatasetError
from colabtools.storage import workspace_error

if TYPE_CHECKING:
    from PIL import Image

    from colabtools import env
    from colabtools.dreambooth.config import PrepareConfig
    from colabtools.dreambooth.session import Session
    from colabtools.drive import Workspace
    from colabtools.images import Box

__all__ = ["CropViewer", "edit_crops"]

_SHOWN_PX = 360
_RESULT_PX = 192
_PAUSE_S = 0.5
_STEPS = {"fine": 0.01, "medium": 0.05, "coarse": 0.2}
_HINT = "<small>arrow keys move, + closer, - wider, Alt+↓ next, Alt+↑ previous</small>"
_OUTLINE = (255, 64, 129)


def edit_crops(
    workspace: Workspace,
    session_name: str,
    config: PrepareConfig,
    *,
    probes: env.Probes | None = None,
) -> None:
    """Show the crop viewer of a session's photos; where nobody looks, the crops stay as found.

    Raises:
        ConfigError: the base model was not made for this resolution.
        DatasetError: there are no photos.
        MissingDependencyError: ipywidgets is not installed.
        SessionError: the name cannot be a folder's, or the session's record is damaged.
        WorkspaceError: the storage failed.
    """
    if frame.is_watched("crops stay as they were found", probes):
        frame.show(CropViewer(create_session(workspace, session_name), config).form)


class CropViewer:
    """The form, as `form`; each nudge shows at once and is saved after a short pause.

    What is saved is the box; `prepare` cuts by it the next time.

    Raises:
        DatasetError: there are no photos.
        MissingDependencyError: ipywidgets is not installed.
    """

    def __init__(self, session: Session, config: PrepareConfig) -> None:
        kit = frame.toolkit()
        self._session = session
        self._cutting = Cutting.of(config)
        self._photos = _find_photos(config.images)
        self._cut: dict[int, _Cut] = {}
        self._laters = {
            index: frame.Later(lambda index=index: self._save(index), _PAUSE_S)  # type: ignore[misc]
            for index in range(len(self._photos))
        }
        self._saving = threading.Lock()
        self._at = 0
        self._strip = frame.Strip(self._photos, self.select)
        self._title, self._state = kit.HTML(), kit.HTML()
        self._whole, self._result = kit.Image(format="png"), kit.Image(format="png")
        self.step = kit.ToggleButtons(options=_STEPS, value=_STEPS["medium"])
        self.step.style.button_width = "auto"
        pictures = kit.HBox([self._whole, self._result])
        pictures.layout.flex_flow = "row wrap"
        pictures.layout.align_items = "flex-end"
        self._previous, self._next = self._turns()
        moves = kit.HBox([*self._buttons(), self._previous, self._next])
        moves.layout.flex_flow = "row wrap"
        rows = [self._strip.box, self._title, pictures, moves, self.step, kit.HTML(_HINT)]
        self.form = kit.VBox([*rows, self._state])
        self.form.add_class("colabtools-crops")
        self.select(0)

    def _buttons(self) -> list[Any]:
        return [
            frame.button("◀", lambda: self.move(-1, 0), key="ArrowLeft", about="left"),
            frame.button("▲", lambda: self.move(0, -1), key="ArrowUp", about="up"),
            frame.button("▼", lambda: self.move(0, 1), key="ArrowDown", about="down"),
            frame.button("▶", lambda: self.move(1, 0), key="ArrowRight", about="right"),
            frame.button("Closer", lambda: self.scale(-1), key="+", about="keep less of it"),
            frame.button("Wider", lambda: self.scale(1), key="-", about="keep more of it"),
            frame.button("As found", self.reset, about="forget the box chosen by hand"),
        ]

    def _turns(self) -> tuple[Any, Any]:
        return (
            frame.button("Previous", lambda: self.select(self._at - 1), key="Alt-ArrowUp"),
            frame.button("Next", lambda: self.select(self._at + 1), key="Alt-ArrowDown"),
        )

    @property
    def box(self) -> Box:
        """The part of the chosen photo that is kept: left, top, right, bottom in its pixels."""
        return self._cut[self._at].box

    @property
    def state(self) -> str:
        """What the form says of the chosen photo's box, as HTML."""
        return str(self._state.value)

    def select(self, index: int) -> None:
        """Choose a photo by its place; the box of the one before is saved first."""
        if not 0 <= index < len(self._photos):
            return
        self._laters[self._at].flush()
        self._at = index
        try:
            if index not in self._cut:
                self._cut[index] = _look(self._photos[index], self._session, self._cutting)
            self._tell(self._cut[index].origin, "done")
        except ColabToolsError as error:
            self._whole.value = self._result.value = frame.picture_bytes(self._photos[index], 64)
            self._title.value = frame.title(self._photos[index].name)
            self._tell(str(error), "failed")
        self._draw()

    def move(self, right: float, down: float) -> None:
        """Move the box by so many steps."""
        if cut := self._cut.get(self._at):
            step = self.step.value
            self._put(cut, move_box(cut.box, cut.size, right * step, down * step))

    def scale(self, steps: float) -> None:
        """Make the box larger by so many steps, or smaller."""
        if cut := self._cut.get(self._at):
            factor = 1 + steps * self.step.value
            self._put(cut, scale_box(cut.box, cut.size, factor, cut.shape))

    def reset(self) -> None:
        """Forget the box that was chosen by hand, and find one again."""
        try:
            with self._saving:
                self._laters[self._at].cancel()
                remove_box(self._photos[self._at], self._session)
        except ColabToolsError as error:
            self._tell(f"not saved: {error}", "failed")
            return
        self._cut.pop(self._at, None)
        self.select(self._at)

    def _put(self, cut: _Cut, box: Box) -> None:
        if box == cut.box:
            self._tell("the photo ends here", "waiting")
            return
        cut.box = box
        self._tell("not saved yet", "waiting")
        self._draw()
        self._laters[self._at].poke()

    def _save(self, index: int) -> None:
        cut = self._cut[index]
        try:
            with self._saving:
                write_box(self._photos[index], self._session, box := cut.box, cut.size)
        except ColabToolsError as error:
            self._tell(f"not saved: {error}", "failed")
            return
        cut.origin = f"saved; the file holds: {_words(box)}"
        if index == self._at and box == cut.box:
            self._tell(cut.origin, "done")

    def _tell(self, text: str, tone: frame.Tone) -> None:
        self._state.value = frame.note(text, tone)

    def _draw(self) -> None:
        name = self._photos[self._at].name
        self._strip.show(self._at, lambda _index: "")
        self._previous.disabled = self._at == 0
        self._next.disabled = self._at == len(self._photos) - 1
        if cut := self._cut.get(self._at):
            place = f"{self._at + 1} of {len(self._photos)}: {name}"
            size = f"{cut.size[0]} x {cut.size[1]}"
            self._title.value = frame.title(f"{place}, kept {_words(cut.box)} of {size}")
            self._whole.value, self._result.value = (
                frame.png_bytes(cut.framed()),
                frame.png_bytes(cut.result()),
            )


@dataclass
class _Cut:
    """A photo, small, and the part of it that is kept, in pixels of the large one."""

    small: Image.Image
    size: tuple[int, int]
    shape: tuple[int, int]
    box: Box
    origin: str

    def _small_box(self) -> Box:
        across, down = self.small.width / self.size[0], self.small.height / self.size[1]
        left, top, right, bottom = self.box
        found = (round(left * across), round(top * down), round(right * across))
        return *found, round(bottom * down)

    def framed(self) -> Image.Image:
        """The photo, what is left out dimmed, and a line round what is kept."""
        from PIL import Image, ImageDraw

        box = self._small_box()
        picture = Image.blend(self.small, Image.new("RGB", self.small.size, "white"), 0.6)
        picture.paste(self.small.crop(box), box[:2])
        line = (box[0], box[1], box[2] - 1, box[3] - 1)
        ImageDraw.Draw(picture).rectangle(line, outline=_OUTLINE, width=2)
        return picture

    def result(self) -> Image.Image:
        """What is kept, in the proportions of the training picture."""
        scale = _RESULT_PX / max(self.shape)
        size = (max(1, round(self.shape[0] * scale)), max(1, round(self.shape[1] * scale)))
        return images.cut(self.small, self._small_box(), size)


def _look(photo: Path, session: Session, cutting: Cutting) -> _Cut:
    """The part of a photo that `prepare` keeps, and why."""
    picture = images.load_upright(photo)
    size, shape = picture.size, nearest_bucket(*picture.size, cutting.shapes)
    found = find_box(picture, shape, cutting.crop)
    # One of few pixels is made larger: a line round its box would hide the box.
    scale = _SHOWN_PX / max(size)
    picture = picture.resize((max(1, round(size[0] * scale)), max(1, round(size[1] * scale))))
    by_hand = read_box(photo, session)
    if by_hand is None:
        return _Cut(picture, size, shape, found, "as found")
    box, then = by_hand
    if then != size:
        told = f"as found: the box kept for it was of a photo of {then[0]} x {then[1]} pixels"
        return _Cut(picture, size, shape, found, told)
    return _Cut(picture, size, shape, fit_box(box, size, shape), "chosen by hand")


def _find_photos(text: str) -> list[Path]:
    folder = micro.subject_path() if text == "demo" else Path(text).expanduser()
    try:
        found = sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in images.PHOTO_SUFFIXES and not path.name.startswith(".")
        )
    except OSError as error:
        raise workspace_error("look for photos in", folder, error) from error
    if not found:
        raise DatasetError(f"no photos in {str(folder)!r}; put some there")
    return found


def _words(box: Box) -> str:
    return f"{box[2] - box[0]} x {box[3] - box[1]} pixels from ({box[0]}, {box[1]})"
