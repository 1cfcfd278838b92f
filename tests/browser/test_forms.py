"""The forms in JupyterLab and Chromium: what a person does there is in the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from colabtools.dreambooth.session import Session, create_session, session_names
from colabtools.drive import Workspace, open_local

from .conftest import Lab, wait

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(240)]


@pytest.fixture
def session(lab: Lab) -> Session:
    """A session of three pictures in a workspace beside the notebook."""
    workspace = open_local(lab.folder / "work space")
    name = f"dog {len(session_names(workspace))}"
    session = create_session(workspace, name)
    session.instance_images_dir.mkdir()
    session.captions_dir.mkdir()
    for number, color in enumerate(("tomato", "gold", "skyblue")):
        picture = Image.new("RGB", (256, 256), color)
        ImageDraw.Draw(picture).ellipse((60, 90, 180, 210), fill="white")
        picture.save(session.instance_images_dir / f"фото-{number}.png")
        (session.captions_dir / f"фото-{number}.txt").write_text("a photo of sks dog\n")
    return session


def opening(session: Session, *calls: str) -> list[str]:
    head = (
        "from colabtools import drive\nfrom colabtools.dreambooth import widgets\n"
        f"workspace = drive.open_local('work space')\nname = {session.name!r}"
    )
    return [head, *calls]


def find(browser: Any, css: str) -> Any:
    from selenium.webdriver.common.by import By

    return browser.find_element(By.CSS_SELECTOR, css)


def click(browser: Any, form: str, text: str) -> None:
    script = (
        "const button = [...document.querySelectorAll(arguments[0] + ' button')]"
        ".find((each) => each.textContent.trim() === arguments[1] && each.offsetParent);"
        "if (!button || button.disabled) return false;"
        "button.scrollIntoView({block: 'center'}); button.click(); return true"
    )
    wait(lambda: browser.execute_script(script, form, text), f"a button {text!r}")


def retype(browser: Any, area: Any, text: str) -> None:
    """Select all and type over it, as text of any script and not key by key."""
    from selenium.webdriver.common.keys import Keys

    area.click()
    area.send_keys(Keys.CONTROL, "a")
    browser.execute_cdp_cmd("Input.insertText", {"text": text})


def caption(session: Session, number: int) -> str:
    return (session.captions_dir / f"фото-{number}.txt").read_text(encoding="utf-8")


def test_an_edited_caption_is_in_the_file_and_there_after_a_reload(
    lab: Lab, browser: Any, session: Session, screenshot: Callable[[str], Path]
) -> None:
    from selenium.webdriver.common.keys import Keys

    form = ".colabtools-captions"
    lab.open(browser, opening(session, "widgets.edit_captions(workspace, name)"))
    area = wait(lambda: find(browser, f"{form} textarea"), "the text area", 60)
    area.click()
    area.send_keys(Keys.END)
    area.send_keys("-7, on a sofa")
    typed = "a photo of sks dog-7, on a sofa"
    wait(lambda: f"saved; the file holds: {typed}" in find(browser, form).text, "the word saved")
    assert caption(session, 0) == f"{typed}\n"
    screenshot("captions-saved")

    area.send_keys(Keys.ALT, Keys.ARROW_DOWN)
    wait(lambda: "2 of 3: фото-1.png" in find(browser, form).text, "the next picture")
    other = "собака 犬 👩‍👩‍👧 sks-2"
    retype(browser, find(browser, f"{form} textarea"), other)
    # At once: what was typed must go to its own picture.
    click(browser, form, "Next ▶")
    wait(lambda: "3 of 3: фото-2.png" in find(browser, form).text, "the last picture")
    wait(lambda: caption(session, 1) == f"{other}\n", "the second caption in its file")
    assert caption(session, 2) == "a photo of sks dog\n"

    browser.refresh()
    lab.run(browser)
    area = wait(lambda: find(browser, f"{form} textarea"), "the text area again", 60)
    assert area.get_attribute("value") == typed
    click(browser, form, "фото-1")
    wait(
        lambda: find(browser, f"{form} textarea").get_attribute("value") == other,
        "the second caption",
    )
    assert [caption(session, number) for number in (0, 1)] == [f"{typed}\n", f"{other}\n"]
    screenshot("captions-reloaded")


def test_a_session_is_picked_and_room_is_freed_by_a_second_word(
    lab: Lab, browser: Any, session: Session, screenshot: Callable[[str], Path]
) -> None:
    from selenium.webdriver.support.select import Select

    workspace = Workspace(lab.folder / "work space")
    create_session(workspace, "a cat")
    session.samples_dir.mkdir()
    (session.samples_dir / "grid.png").write_bytes(bytes(3_000_000))
    cells = opening(
        session,
        "choice = widgets.pick_session(workspace, name)",
        "widgets.manage_space(workspace)",
    )
    lab.open(browser, cells)
    listed = wait(lambda: find(browser, ".colabtools-sessions select"), "the list", 60)
    label = next(o.text for o in Select(listed).options if o.text.startswith("a cat"))
    Select(listed).select_by_visible_text(label)
    wait(
        lambda: "session 'a cat' (chosen)" in find(browser, ".colabtools-sessions").text,
        "the choice",
    )
    screenshot("session-picked")

    space = ".colabtools-space"
    click(browser, space, "Measure")
    wait(lambda: "pick what may go" in find(browser, space).text, "the list of what takes room")
    items = Select(find(browser, f"{space} select"))
    label = next(o.text for o in items.options if o.text.startswith(f"{session.name}: samples"))
    items.select_by_visible_text(label)
    click(browser, space, "Free…")
    wait(lambda: "to be removed" in find(browser, space).text, "the question")
    assert session.samples_dir.is_dir()
    screenshot("space-asked")
    click(browser, space, "Yes, remove them")
    wait(lambda: "freed 3 MB" in find(browser, space).text, "the room")
    assert not session.samples_dir.exists()
    assert session.instance_images_dir.is_dir()
    screenshot("space-freed")
