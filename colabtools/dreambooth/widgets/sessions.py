"""The session picker: those that are there in a few words each, or the name of a new one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from colabtools.dreambooth.names import RULE, clean_name
from colabtools.dreambooth.shelf import list_sessions
from colabtools.dreambooth.widgets import frame
from colabtools.errors import ColabToolsError, SessionError

if TYPE_CHECKING:
    from colabtools import env
    from colabtools.drive import Workspace

__all__ = ["Choice", "SessionPicker", "pick_session"]


class Choice:
    """Which session the steps work on, as `name`; the form changes it, later cells read it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        """The name."""
        return self.name


def pick_session(workspace: Workspace, default: str, *, probes: env.Probes | None = None) -> Choice:
    """The choice that the form changes; until then, and where nobody looks, it is the default.

    Raises:
        MissingDependencyError: ipywidgets is not installed.
        WorkspaceError: the storage failed.
    """
    choice = Choice(default)
    if frame.is_watched(f"session {default!r} is used", probes):
        frame.show(SessionPicker(workspace, choice).form)
    return choice


class SessionPicker:
    """The form, as `form`; what is chosen there is at once the `choice`.

    Raises:
        MissingDependencyError: ipywidgets is not installed.
        WorkspaceError: the storage failed.
    """

    def __init__(self, workspace: Workspace, choice: Choice) -> None:
        kit = frame.toolkit()
        self.choice = choice
        self._workspace = workspace
        self._listing = False
        self.listed = kit.Select(rows=6)
        self.listed.layout.width = "95%"
        self.new = kit.Text(placeholder="my-subject", description="New:")
        self._look_again = frame.button("Look again", self.refresh)
        self._state = kit.HTML()
        self.refresh()
        self.listed.observe(self._picked, "value")
        self.new.observe(self._named, "value")
        row = kit.HBox([self.new, self._look_again])
        self.form = kit.VBox([kit.HTML(frame.title("Session")), self.listed, row, self._state])
        self.form.add_class("colabtools-sessions")

    @property
    def state(self) -> str:
        """What the form says of the choice, as HTML."""
        return str(self._state.value)

    @property
    def _names(self) -> set[str]:
        return {name for _, name in self.listed.options}

    def refresh(self) -> None:
        """List what is there now; the choice stays."""
        try:
            found = list_sessions(self._workspace)
        except ColabToolsError as error:
            self._state.value = frame.note(str(error), "failed")
            return
        name = self.choice.name
        self._listing = True  # new options choose the first of them by themselves
        self.listed.options = [(summary.line(), summary.name) for summary in found]
        self.listed.value = name if name in self._names else None
        self._listing = False
        self._tell()

    def _picked(self, change: dict[str, object]) -> None:
        if change["new"] is not None and not self._listing:
            self.choice.name = str(change["new"])
            self._tell()

    def _named(self, change: dict[str, object]) -> None:
        text = str(change["new"])
        if not text.strip():
            return
        try:
            name = clean_name(text)
        except SessionError as error:
            self._state.value = frame.note(f"{error}; still {self.choice.name!r}", "failed")
            return
        self.choice.name = name
        self.listed.value = name if name in self._names else None
        self._tell(f"{text!r} becomes {name!r}: {RULE}" if name != text else "")

    def _tell(self, remark: str = "") -> None:
        name = self.choice.name
        what = "chosen" if name in self._names else "new, the next step makes it"
        told = f"session {name!r} ({what}); the steps below work on it"
        self._state.value = frame.note(f"{told}. {remark}" if remark else told, "done")
