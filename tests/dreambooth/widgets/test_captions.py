"""The caption editor, driven as a page does: values that change, buttons that are clicked."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from colabtools import env
from colabtools.dreambooth.claims import find_holders
from colabtools.dreambooth.session import Session
from colabtools.dreambooth.widgets import CaptionEditor, edit_captions
from colabtools.drive import Workspace
from colabtools.errors import WorkspaceError


def stored(session: Session, number: int) -> str:
    return (session.captions_dir / f"photo {number}.txt").read_text(encoding="utf-8")


def buttons(editor: CaptionEditor) -> dict[str, Any]:
    import ipywidgets

    found, waiting = {}, [editor.form]
    while waiting:
        widget = waiting.pop()
        waiting += getattr(widget, "children", ())
        if isinstance(widget, ipywidgets.Button):
            found[widget.description] = widget
    return found


def test_it_opens_with_the_first_picture_and_what_its_file_holds(session: Session) -> None:
    editor = CaptionEditor(session)
    assert editor.text.value == "a photo of sks dog"
    assert "the file holds: a photo of sks dog" in editor.state


@pytest.mark.parametrize("text", ["sks-2 007", "犬 👩‍👩‍👧", "a <b>dog</b> & more"])
def test_what_is_typed_is_in_the_file_before_it_is_called_saved(
    session: Session, text: str
) -> None:
    editor = CaptionEditor(session)
    editor.text.value = text
    assert stored(session, 0) == f"{text}\n"
    assert "✓ saved; the file holds:" in editor.state
    assert "<b>dog" not in editor.state


def test_one_goes_on_and_back_by_buttons(session: Session) -> None:
    editor = CaptionEditor(session)
    named = buttons(editor)
    assert named["◀ Previous"].disabled
    named["Next ▶"].click()
    assert editor.text.value == "sks dog, sitting"
    named["Next ▶"].click()
    assert editor.text.value == ""
    assert "caption missing" in editor.state
    named["◀ Previous"].click()
    assert editor.text.value == "sks dog, sitting"
    for _ in range(20):
        editor.next()
    assert named["Next ▶"].disabled


def test_the_keys_for_going_on_are_on_the_buttons(session: Session) -> None:
    named = buttons(CaptionEditor(session))
    assert "colabtools-key-Alt-ArrowDown" in named["Next ▶"]._dom_classes
    assert "colabtools-key-Alt-ArrowUp" in named["◀ Previous"]._dom_classes


def test_small_pictures_choose_and_say_which_captions_are_missing(session: Session) -> None:
    editor = CaptionEditor(session)
    assert {"photo 0", "photo 1", "⚠ photo 2", "⚠ photo 7"} < buttons(editor).keys()
    buttons(editor)["⚠ photo 7"].click()
    editor.text.value = "seven"
    assert stored(session, 7) == "seven\n"
    assert "photo 7" in buttons(editor)
    editor.next()
    # The next page has the last two alone.
    assert {"⚠ photo 8", "⚠ photo 9"} < buttons(editor).keys()
    shown = [slot for slot in editor.form.children[0].children if slot.layout.display != "none"]
    assert len(shown) == 2


def test_words_that_arrive_late_stay_with_their_picture(session: Session) -> None:
    editor = CaptionEditor(session)
    late = editor.text
    editor.next()
    late.value = "typed before the click, sent after it"
    assert stored(session, 0) == "typed before the click, sent after it\n"
    assert stored(session, 1) == "sks dog, sitting\n"
    assert editor.text.value == "sks dog, sitting"


def test_a_pause_in_typing_saves_once(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    from colabtools.dreambooth import editing
    from colabtools.dreambooth.widgets import captions

    saved: list[str] = []

    def count(session: Session, picture: Any, text: str) -> str:
        saved.append(text)
        return editing.write_caption(session, picture, text)

    monkeypatch.setattr(captions, "write_caption", count)
    monkeypatch.setattr(captions, "_PAUSE_S", 0.1)

    async def type_in() -> None:
        editor = CaptionEditor(session)
        for length in range(1, 8):
            editor.text.value = "a shiny"[:length]
            assert "not saved yet" in editor.state
        assert saved == []
        await asyncio.sleep(0.3)
        assert "✓ saved" in editor.state
        editor.text.value = "and more"
        editor.next()
        assert saved == ["a shiny", "and more"]

    asyncio.run(type_in())
    assert stored(session, 0) == "and more\n"


def test_two_pictures_saved_by_two_threads_wait_for_each_other(session: Session) -> None:
    editor = CaptionEditor(session)
    first = editor.text
    editor.next()
    second = editor.text
    words = [f"number {number}" for number in range(20)]
    threads = [
        threading.Thread(target=lambda area=area: [setattr(area, "value", w) for w in words])
        for area in (first, second)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [stored(session, number) for number in (0, 1)] == ["number 19\n"] * 2
    assert "✓ saved" in editor.state
    assert not find_holders(session.folder)


def test_a_failure_is_shown_and_the_old_text_stays(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    from colabtools.dreambooth import editing

    def fail(path: Any, data: bytes) -> None:
        raise WorkspaceError("cannot write: no space left on device; free some room")

    editor = CaptionEditor(session)
    with monkeypatch.context() as broken:
        broken.setattr(editing, "write_atomic", fail)
        editor.text.value = "new"
    assert "✗ not saved: cannot write: no space left" in editor.state
    assert stored(session, 0) == "a photo of sks dog\n"
    editor.text.value = "newer"
    assert "✓ saved" in editor.state


def test_a_change_from_elsewhere_is_shown_before_it_is_replaced(session: Session) -> None:
    editor = CaptionEditor(session)
    (session.captions_dir / "photo 0.txt").write_text("from elsewhere\n")
    editor.text.value = "mine"
    assert "changed elsewhere" in editor.state
    assert "from elsewhere" in editor.state
    assert stored(session, 0) == "from elsewhere\n"
    editor.text.value = "mine!"
    assert stored(session, 0) == "mine!\n"


def test_a_caption_that_is_no_text_can_be_typed_anew(session: Session) -> None:
    (session.captions_dir / "photo 0.txt").write_bytes(b"\xff\xfe\x00")
    editor = CaptionEditor(session)
    assert "is not UTF-8 text" in editor.state
    editor.text.value = "a dog"
    assert stored(session, 0) == "a dog\n"


def test_a_damaged_picture_leaves_the_others_editable(session: Session) -> None:
    (session.instance_images_dir / "photo 0.png").write_bytes(b"no picture")
    editor = CaptionEditor(session)
    editor.next()
    editor.text.value = "one"
    assert stored(session, 1) == "one\n"


def test_where_nobody_looks_one_line_says_so(
    workspace: Workspace,
    session: Session,
    papermill: env.Probes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for probes in (papermill, None):
        edit_captions(workspace, "dog", probes=probes)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "no form is shown here (headless): captions stay as they are",
        "no form is shown here (process): captions stay as they are",
    ]
    assert stored(session, 0) == "a photo of sks dog\n"


def test_where_somebody_looks_the_form_and_its_keys_are_displayed(
    workspace: Workspace,
    session: Session,
    jupyter: env.Probes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from IPython import display

    shown: list[Any] = []
    monkeypatch.setattr(display, "display", shown.append)
    edit_captions(workspace, "dog", probes=jupyter)
    form, keys = shown
    assert {"colabtools-form", "colabtools-captions"} <= set(form._dom_classes)
    assert "addEventListener" in keys.data
