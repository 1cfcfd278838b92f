"""The session picker: a choice that later cells read."""

from __future__ import annotations

import pytest

from colabtools import env
from colabtools.dreambooth.session import Session, create_session, session_names
from colabtools.dreambooth.widgets import SessionPicker, pick_session
from colabtools.dreambooth.widgets.sessions import Choice
from colabtools.drive import Workspace


def test_those_that_are_there_are_listed_in_words(workspace: Workspace, session: Session) -> None:
    create_session(workspace, "a cat")
    picker = SessionPicker(workspace, Choice("dog"))
    labels = dict(picker.listed.options)
    assert list(labels.values()) == ["a cat", "dog"]
    assert "10 pictures" in next(label for label in labels if label.startswith("dog"))
    assert picker.listed.value == "dog"
    assert "chosen" in picker.state


def test_a_default_that_is_not_there_yet_stays_the_choice(
    workspace: Workspace, session: Session
) -> None:
    picker = SessionPicker(workspace, Choice("new one"))
    assert picker.choice.name == "new one"
    assert picker.listed.value is None
    assert "the next step makes it" in picker.state


def test_a_picked_one_is_the_choice_at_once(workspace: Workspace, session: Session) -> None:
    create_session(workspace, "a cat")
    picker = SessionPicker(workspace, Choice("dog"))
    picker.listed.value = "a cat"
    assert str(picker.choice) == "a cat"


def test_a_new_name_is_cleaned_and_the_rule_is_shown(
    workspace: Workspace, session: Session
) -> None:
    picker = SessionPicker(workspace, Choice("dog"))
    picker.new.value = "sks/собака 007-b?"
    assert picker.choice.name == "sks-собака 007-b"
    assert "becomes &#x27;sks-собака 007-b&#x27;: up to 64 letters" in picker.state
    assert picker.listed.value is None
    picker.new.value = "dog"
    assert picker.listed.value == "dog"
    assert session_names(workspace) == ["dog"]


def test_a_name_of_which_nothing_is_left_changes_nothing(
    workspace: Workspace, session: Session
) -> None:
    picker = SessionPicker(workspace, Choice("dog"))
    picker.new.value = "///"
    assert picker.choice.name == "dog"
    assert "✗ no session name can be made of" in picker.state


def test_looking_again_finds_new_ones_and_keeps_the_choice(
    workspace: Workspace, session: Session
) -> None:
    picker = SessionPicker(workspace, Choice("dog"))
    create_session(workspace, "a cat")
    picker.refresh()
    assert [name for _, name in picker.listed.options] == ["a cat", "dog"]
    assert picker.choice.name == picker.listed.value == "dog"


def test_where_nobody_looks_the_default_is_used(
    workspace: Workspace, papermill: env.Probes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pick_session(workspace, "my dog", probes=papermill).name == "my dog"
    line = "no form is shown here (headless): session 'my dog' is used\n"
    assert capsys.readouterr().err == line
