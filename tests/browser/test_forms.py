"""The forms in JupyterLab and Chromium: what a person does there is in the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from PIL import Image, ImageDraw

from colabtools.dreambooth.session import Session, create_session, open_session, session_names
from colabtools.drive import Workspace, open_local

from .conftest import ROOT, Lab, wait

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


@pytest.fixture
def photos(lab: Lab) -> Path:
    """A wide photo and a tall one, their subjects away from the middle."""
    folder = lab.folder / "my photos"
    folder.mkdir(exist_ok=True)
    for name, size in (("a wide", (900, 600)), ("b tall", (600, 900))):
        photo = Image.new("RGB", size, "skyblue")
        pen = ImageDraw.Draw(photo)
        pen.rectangle((0, size[1] * 2 // 3, *size), fill="olivedrab")
        pen.ellipse((60, 260, 340, 540), fill="tomato", outline="black", width=6)
        photo.save(folder / f"{name}.jpg")
    return folder


def kept_box(session: Session, stem: str) -> tuple[int, ...]:
    """The box in a photo's sidecar, none if there is no sidecar yet."""
    path = session.folder / "crops" / f"{stem}.crop.json"
    return tuple(json.loads(path.read_text("utf-8"))["box"]) if path.is_file() else ()


def press(browser: Any, form: str, *keys: str) -> None:
    """Press keys in a form, with the focus on one of its buttons as after a click."""
    css = f"{form} button.colabtools-key-ArrowUp"
    wait(lambda: find(browser, css).send_keys(*keys) is None, "a button with the focus")


def saved_box(
    browser: Any, session: Session, stem: str, before: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """The box of a photo, once it is another and the form says that it is saved."""

    def look() -> tuple[int, ...]:
        if (box := kept_box(session, stem)) == before:
            return ()
        words = f"{box[2] - box[0]} x {box[3] - box[1]} pixels from ({box[0]}, {box[1]})"
        text = find(browser, ".colabtools-crops").text
        return box if f"saved; the file holds: {words}" in text and f"kept {words}" in text else ()

    return wait(look, f"the saved box of {stem}")


def test_a_nudged_crop_is_in_its_file_and_there_after_a_reload(
    lab: Lab, browser: Any, session: Session, photos: Path, screenshot: Callable[[str], Path]
) -> None:
    from selenium.webdriver.common.keys import Keys

    form = ".colabtools-crops"
    config = "from colabtools.dreambooth.config import PrepareConfig\n"
    config += f"photos = PrepareConfig(images={str(photos)!r})"
    lab.open(browser, opening(session, config, "widgets.edit_crops(workspace, name, photos)"))
    wait(lambda: "as found" in find(browser, form).text, "the box that was found", 60)
    screenshot("crops-found")
    assert not (session.folder / "crops").exists()

    click(browser, form, "Closer")
    closer = saved_box(browser, session, "a wide")
    assert closer[2] - closer[0] == closer[3] - closer[1] == 570
    click(browser, form, "coarse")
    click(browser, form, "▼")
    moved = saved_box(browser, session, "a wide", closer)
    assert moved == (closer[0], 30, closer[2], 600)
    press(browser, form, Keys.ARROW_RIGHT)
    right = saved_box(browser, session, "a wide", moved)
    assert right == (moved[0] + 114, 30, moved[2] + 114, 600)
    screenshot("crops-saved")

    press(browser, form, Keys.ALT, Keys.ARROW_DOWN)
    wait(lambda: "2 of 2: b tall.jpg" in find(browser, form).text, "the next photo")
    press(browser, form, "-")
    wait(lambda: "the photo ends here" in find(browser, form).text, "the photo's end")
    press(browser, form, Keys.ARROW_DOWN)
    # At once: the box must be saved though the form turns to another photo.
    click(browser, form, "a wide")
    wait(lambda: "1 of 2: a wide.jpg" in find(browser, form).text, "the first photo")
    tall = wait(lambda: kept_box(session, "b tall"), "the second box in its file")

    browser.refresh()
    lab.run(browser)
    wait(lambda: "chosen by hand" in find(browser, form).text, "the box again", 60)
    assert f"kept 570 x 570 pixels from ({right[0]}, 30)" in find(browser, form).text
    click(browser, form, "b tall")
    words = f"kept 600 x 600 pixels from (0, {tall[1]})"
    wait(lambda: words in find(browser, form).text, "the second box")
    assert (kept_box(session, "a wide"), kept_box(session, "b tall")) == (right, tall)
    screenshot("crops-reloaded")


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


def test_the_notebook_shows_its_forms_and_saves_what_is_chosen(
    lab: Lab, browser: Any, screenshot: Callable[[str], Path]
) -> None:
    cells = nbformat.read(ROOT / "notebooks" / "dreambooth_training.ipynb", as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    last = next(i for i, source in enumerate(code) if "6. Edit captions" in source)
    lab.open(browser, code[: last + 1])
    shown = ("sessions", "space", "crops", "captions")
    for form in shown:
        wait(lambda form=form: find(browser, f".colabtools-{form}").text, form, 60)
    session = open_session(Workspace(lab.folder / "workspace"), "my-subject")
    screenshot("notebook")

    click(browser, ".colabtools-crops", "Closer")
    words = "kept 61 x 61 pixels"
    wait(lambda: words in find(browser, ".colabtools-crops").text, "the smaller crop")
    wait(lambda: kept_box(session, "1"), "the crop in its file")
    screenshot("notebook-crops")
    retype(browser, find(browser, ".colabtools-captions textarea"), "a sks star, small")
    file = session.captions_dir / "1.txt"
    wait(lambda: file.read_text("utf-8") == "a sks star, small\n", "the caption in its file")
    screenshot("notebook-captions")
