"""The space manager: what takes room, and freeing what is picked, with a second word before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from colabtools.dreambooth.space import free_items, measure_space
from colabtools.dreambooth.widgets import frame
from colabtools.errors import ColabToolsError
from colabtools.storage import size_text

if TYPE_CHECKING:
    from colabtools import env
    from colabtools.dreambooth.space import Item
    from colabtools.drive import Workspace

__all__ = ["SpaceManager", "manage_space"]


def manage_space(workspace: Workspace, *, probes: env.Probes | None = None) -> None:
    """Show the space manager of a workspace; where nobody looks, nothing is freed.

    Raises:
        MissingDependencyError: ipywidgets is not installed.
    """
    if frame.is_watched("nothing is measured or freed", probes):
        frame.show(SpaceManager(workspace).form)


class SpaceManager:
    """The form, as `form`; it measures when asked, since that takes long on Google Drive.

    Raises:
        MissingDependencyError: ipywidgets is not installed.
    """

    def __init__(self, workspace: Workspace) -> None:
        kit = frame.toolkit()
        self._workspace = workspace
        self._items: tuple[Item, ...] = ()
        self._asked: tuple[Item, ...] = ()
        self.list = kit.SelectMultiple(rows=8)
        self.list.layout.width = "95%"
        self.list.observe(self._picked, "value")
        self.measure_button = frame.button("Measure", self.measure)
        self.free_button = frame.button("Free…", self.ask)
        self.yes_button = frame.button("Yes, remove them", self.free)
        self.yes_button.button_style = "danger"
        self.no_button = frame.button("Keep them", self.keep)
        self._state = kit.HTML()
        row = kit.HBox([self.measure_button, self.free_button, self.yes_button, self.no_button])
        self.form = kit.VBox([kit.HTML(frame.title("Space")), self.list, row, self._state])
        self.form.add_class("colabtools-space")
        self._ready("measure to see what takes room", "waiting")

    @property
    def state(self) -> str:
        """What the form says, as HTML."""
        return str(self._state.value)

    def measure(self) -> None:
        """List what takes room now."""
        try:
            self._list()
            free = size_text(self._workspace.free_bytes())
        except ColabToolsError as error:
            self._ready(str(error), "failed")
            return
        self._ready(f"{free} free; pick what may go (several with Ctrl or Shift)", "done")

    def ask(self) -> None:
        """Say what would go and ask for the second word; nothing goes yet."""
        self._asked = tuple(self._items[index] for index in self.list.value)
        if not self._asked:
            self._ready("nothing is picked", "waiting")
            return
        self._state.value = frame.note(
            "to be removed: " + "; ".join(item.line() for item in self._asked), "asked"
        )
        self._switch(asking=True)

    def free(self) -> None:
        """Remove what was asked about, after the second word."""
        asked, self._asked = self._asked, ()
        if not asked:
            return
        tone: frame.Tone = "done"
        try:
            told = free_items(self._workspace, asked).line()
        except ColabToolsError as error:
            told, tone = str(error), "failed"
        try:
            self._list()
        except ColabToolsError as error:
            told, tone = f"{told}; {error}", "failed"
        self._ready(told, tone)

    def keep(self) -> None:
        """Remove nothing."""
        self._ready("nothing was removed", "done")

    def _picked(self, _change: object) -> None:
        # The second word is for what was shown, not for what is picked later.
        if self._asked:
            self.keep()

    def _list(self) -> None:
        self._items = measure_space(self._workspace)
        self.list.value = ()
        self.list.options = [(item.line(), index) for index, item in enumerate(self._items)]

    def _ready(self, text: str, tone: frame.Tone) -> None:
        self._asked = ()
        self._state.value = frame.note(text, tone)
        self._switch(asking=False)

    def _switch(self, *, asking: bool) -> None:
        self.free_button.disabled = asking or not self._items
        self.yes_button.layout.display = self.no_button.layout.display = "" if asking else "none"
