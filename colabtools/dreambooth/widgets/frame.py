"""What all forms share: whether anybody looks, how a saved text shows, keys, small pictures."""

from __future__ import annotations

import asyncio
import html
import io
import sys
import threading
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from colabtools import env
from colabtools.errors import ImageError, MissingDependencyError
from colabtools.images import load_upright

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from PIL import Image

__all__ = [
    "Later",
    "Strip",
    "Tone",
    "button",
    "is_watched",
    "note",
    "picture_bytes",
    "png_bytes",
    "show",
    "title",
    "toolkit",
]

_SLOTS = 8
_SMALL_PX = 96
_TONES = {
    "asked": ("?", "#b06000"),
    "done": ("✓", "#137333"),
    "failed": ("✗", "#b3261e"),
    "waiting": ("…", "#5f6368"),
}
Tone: TypeAlias = Literal["asked", "done", "failed", "waiting"]
_WATCHED = (env.Place.COLAB, env.Place.JUPYTER)

# One listener for a page, however often cells run. A key clicks the button of its name in the form
# that has the focus; without Alt, keys belong to what is being typed or chosen in.
_KEYS = """
if (!window.colabtoolsKeys) {
  window.colabtoolsKeys = true;
  document.addEventListener("keydown", (event) => {
    const form = event.target.closest && event.target.closest(".colabtools-form");
    if (!form || event.ctrlKey || event.metaKey) return;
    if (!event.altKey && event.target.closest("textarea, input, select")) return;
    const name = "colabtools-key-" + (event.altKey ? "Alt-" : "") + event.key;
    const button = [...form.querySelectorAll("button")].find(
      (each) => each.classList.contains(name) && !each.disabled);
    if (!button) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    button.click();
  }, true);
}
"""


def is_watched(default: str, probes: env.Probes | None = None) -> bool:
    """Whether a person sees the cell's output; if not, one line says what is done instead."""
    place = env.where(probes).place
    if place in _WATCHED:
        return True
    sys.stderr.write(f"no form is shown here ({place.value}): {default}\n")
    sys.stderr.flush()
    return False


def toolkit() -> Any:
    """The module ipywidgets.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import ipywidgets
    except ImportError as error:
        raise MissingDependencyError(
            f"forms need ipywidgets ({error}); run: pip install 'colabtools[notebook]'"
        ) from error
    return ipywidgets


def show(form: Any) -> None:
    """Put a form below the cell, with the keys that click its buttons."""
    from IPython import display

    form.add_class("colabtools-form")
    display.display(form)  # type: ignore[no-untyped-call,unused-ignore]
    display.display(display.Javascript(_KEYS))  # type: ignore[no-untyped-call,unused-ignore]


def note(text: str, tone: Tone) -> str:
    """A line of HTML for a person, which screen readers say when it changes."""
    mark, color = _TONES[tone]
    return f'<span role="status" style="color: {color}">{mark} {html.escape(text)}</span>'


def title(text: str) -> str:
    """A heading as HTML."""
    return f"<b>{html.escape(text)}</b>"


def button(description: str, act: Callable[[], None], *, key: str = "", about: str = "") -> Any:
    """A button that does something, when its key is pressed in the form as well."""
    made = toolkit().Button(description=description, tooltip=about or description)
    made.layout.width = "auto"
    if key:
        made.add_class(f"colabtools-key-{key}")
    made.on_click(lambda _button: act())
    return made


def picture_bytes(path: Path, side: int) -> bytes:
    """A picture as a PNG that fits into a square, upright.

    One that cannot be decoded is a grey square: the form goes on to serve the others.
    """
    from PIL import Image

    try:
        picture = load_upright(path)
    except ImageError:
        picture = Image.new("RGB", (side, side), "grey")
    picture.thumbnail((side, side))
    return png_bytes(picture)


def png_bytes(picture: Image.Image) -> bytes:
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


class Strip:
    """A page of small pictures with a button each, as `box`; one is chosen."""

    def __init__(self, pictures: Sequence[Path], choose: Callable[[int], None]) -> None:
        kit = toolkit()
        self._pictures = pictures
        self._choose = choose
        self._first = 0
        self._bytes: dict[int, bytes] = {}
        self._images = [kit.Image(format="png") for _ in pictures[:_SLOTS]]
        self._buttons = [
            button("", lambda slot=slot: self._choose(self._first + slot))  # type: ignore[misc]
            for slot in range(len(self._images))
        ]
        self._slots = [
            kit.VBox([image, below])
            for image, below in zip(self._images, self._buttons, strict=True)
        ]
        for image, below in zip(self._images, self._buttons, strict=True):
            image.layout.height = f"{_SMALL_PX}px"
            image.layout.object_fit = "contain"
            below.layout.width = image.layout.width = f"{_SMALL_PX + 8}px"
        self.box = kit.HBox(self._slots)
        self.box.layout.flex_flow = "row wrap"

    def show(self, chosen: int, problem_of: Callable[[int], str]) -> None:
        """Turn to the page of the chosen picture; those with a problem carry a mark."""
        self._first = chosen // _SLOTS * _SLOTS
        for slot, box in enumerate(self._slots):
            index = self._first + slot
            box.layout.display = "flex" if index < len(self._pictures) else "none"
            if index >= len(self._pictures):
                continue
            path = self._pictures[index]
            if index not in self._bytes:
                self._bytes[index] = picture_bytes(path, _SMALL_PX)
            self._images[slot].value = self._bytes[index]
            problem = problem_of(index)
            self._buttons[slot].description = f"⚠ {path.stem}" if problem else path.stem
            self._buttons[slot].tooltip = f"{path.name}: {problem or 'choose it'}"
            self._buttons[slot].button_style = "primary" if index == chosen else ""


class Later:
    """An act that waits for a pause in the typing; without a running event loop it waits for none.

    What a page sends may be handled in another thread each time, so no timer is ever taken back;
    one that is not the last finds its turn over.

    Attributes:
        waiting: whether the act is still to come.
    """

    def __init__(self, act: Callable[[], None], delay_s: float) -> None:
        self.waiting = False
        self._act = act
        self._delay_s = delay_s
        self._turn = 0
        self._lock = threading.Lock()

    def poke(self) -> None:
        """Act once nothing was poked for a while."""
        with self._lock:
            self.waiting = True
            self._turn += 1
            turn = self._turn
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
            return
        loop.call_later(self._delay_s, self._take_turn, turn)

    def cancel(self) -> None:
        """Do not act."""
        with self._lock:
            self.waiting = False

    def _take_turn(self, turn: int) -> None:
        if turn == self._turn:
            self.flush()

    def flush(self) -> None:
        """Act now, if the act is still to come."""
        with self._lock:
            waiting, self.waiting = self.waiting, False
        if waiting:
            self._act()
