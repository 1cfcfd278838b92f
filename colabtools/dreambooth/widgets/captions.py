"""The caption editor: small pictures to choose from, the picture, its words and their state."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from colabtools.dreambooth.editing import list_captions, read_caption, write_caption
from colabtools.dreambooth.session import open_session
from colabtools.dreambooth.widgets import frame
from colabtools.errors import ColabToolsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from colabtools import env
    from colabtools.dreambooth.editing import Captioned
    from colabtools.dreambooth.session import Session
    from colabtools.drive import Workspace

__all__ = ["CaptionEditor", "edit_captions"]

_LARGE_PX = 320
_PAUSE_S = 0.5


def edit_captions(
    workspace: Workspace, session_name: str, *, probes: env.Probes | None = None
) -> None:
    """Show the caption editor of a session; where nobody looks, the captions stay as they are.

    Raises:
        DatasetError: the session has no training pictures.
        MissingDependencyError: ipywidgets is not installed.
        SessionError: there is no such session.
        WorkspaceError: the storage failed.
    """
    if frame.is_watched("captions stay as they are", probes):
        frame.show(CaptionEditor(open_session(workspace, session_name)).form)


class CaptionEditor:
    """The form, as `form`; what is typed is saved after a short pause, and when one moves on.

    Each picture has a text area of its own for as long as the form lives. With a single one, words
    that the page sends late would end up with the picture that was chosen meanwhile.

    Raises:
        DatasetError: the session has no training pictures.
        MissingDependencyError: ipywidgets is not installed.
    """

    def __init__(self, session: Session) -> None:
        kit = frame.toolkit()
        self._session = session
        self._entries = list_captions(session)
        self._saving = threading.Lock()
        self._texts: dict[int, _Text] = {}
        self._at = -1
        self._strip = frame.Strip([entry.picture for entry in self._entries], self.select)
        self._large = kit.Image(format="png")
        self._large.layout.object_fit = "contain"
        self._large.layout.height = self._large.layout.max_width = f"{_LARGE_PX}px"
        self._place = kit.VBox()
        self._place.layout.flex = "1 1 300px"
        self._previous = frame.button("◀ Previous", self.previous, key="Alt-ArrowUp")
        self._next = frame.button("Next ▶", self.next, key="Alt-ArrowDown")
        keys = kit.HTML("<small>Alt+↓ next, Alt+↑ previous</small>")
        middle = kit.HBox([self._large, self._place])
        middle.layout.flex_flow = "row wrap"
        row = kit.HBox([self._previous, self._next, keys])
        self.form = kit.VBox([self._strip.box, middle, row])
        self.form.add_class("colabtools-captions")
        self.select(0)

    @property
    def text(self) -> Any:
        """The text area of the chosen picture."""
        return self._texts[self._at].area

    @property
    def state(self) -> str:
        """What the form says of the chosen picture's caption, as HTML."""
        return str(self._texts[self._at].state.value)

    def previous(self) -> None:
        """Choose the picture before this one."""
        self.select(self._at - 1)

    def next(self) -> None:
        """Choose the picture after this one."""
        self.select(self._at + 1)

    def select(self, index: int) -> None:
        """Choose a picture by its place; what was typed for the one before is saved first."""
        if not 0 <= index < len(self._entries):
            return
        if self._at >= 0:
            self._texts[self._at].later.flush()
        self._at = index
        picture = self._entries[index].picture
        if index not in self._texts:
            text = _Text(self._session, self._entries[index], self._saving, self._mark)
            text.title.value = frame.title(f"{index + 1} of {len(self._entries)}: {picture.name}")
            self._texts[index] = text
        self._large.value = frame.picture_bytes(picture, _LARGE_PX)
        self._place.children = (self._texts[index].box,)
        self._previous.disabled = index == 0
        self._next.disabled = index == len(self._entries) - 1
        self._mark()

    def _mark(self) -> None:
        self._strip.show(self._at, self._problem_of)

    def _problem_of(self, index: int) -> str:
        text = self._texts.get(index)
        return self._entries[index].problem if text is None else text.problem


class _Text:
    """The words of one picture: where they are typed, and what became of them."""

    def __init__(
        self, session: Session, entry: Captioned, saving: threading.Lock, saved: Callable[[], None]
    ) -> None:
        kit = frame.toolkit()
        self.problem = entry.problem
        self.later = frame.Later(self._save, _PAUSE_S)
        self._session = session
        self._picture = entry.picture
        self._saving = saving
        self._saved = saved
        self._on_disk = entry.caption
        self.area = kit.Textarea(
            value=entry.caption,
            rows=5,
            placeholder="what is to be seen, such as: a photo of sks dog",
        )
        self.area.layout.width = "95%"
        self.area.observe(self._typed, "value")
        self.state = kit.HTML()
        # In one box, so that a page never shows one picture's name above another's words.
        self.title = kit.HTML()
        self.box = kit.VBox([self.title, self.area, self.state])
        if self.problem in ("", "missing", "empty"):
            self._tell(self.problem and f"caption {self.problem}")
        else:
            self.state.value = frame.note(self.problem, "failed")

    def _typed(self, _change: object) -> None:
        self.state.value = frame.note("not saved yet", "waiting")
        self.later.poke()

    def _save(self) -> None:
        """Save what was typed; two threads that save would shut each other out."""
        with self._saving:
            self._save_alone()

    def _save_alone(self) -> None:
        """Save what was typed, unless someone else changed the file since it was read."""
        typed = self.area.value
        try:
            now = "" if self._is_broken() else read_caption(self._session, self._picture)
            if now not in (self._on_disk, " ".join(typed.split())):
                self._on_disk = now
                self.state.value = frame.note(
                    f"not saved: the file was changed elsewhere and holds {now!r}; "
                    "change your text once more to replace that",
                    "failed",
                )
                return
            self._on_disk = write_caption(self._session, self._picture, typed)
        except ColabToolsError as error:
            self.state.value = frame.note(f"not saved: {error}", "failed")
            return
        self.problem = "" if self._on_disk else "empty"
        self._tell("saved")
        self._saved()

    def _is_broken(self) -> bool:
        """Whether the file holds no text at all, which the person mends by typing one."""
        return self.problem not in ("", "missing", "empty")

    def _tell(self, what: str) -> None:
        """Show what the file holds, so that nobody has to believe a word like "saved"."""
        holds = f"the file holds: {self._on_disk}" if self._on_disk else "the file holds no words"
        self.state.value = frame.note(f"{what}; {holds}" if what else holds, "done")
