"""What is said of sessions, ours, old and damaged ones."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from colabtools.dreambooth.lease import hold
from colabtools.dreambooth.session import create_session
from colabtools.dreambooth.shelf import list_sessions, show_session
from colabtools.drive import Workspace
from colabtools.errors import SessionError, StorageLostError


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def test_an_empty_workspace_has_no_sessions_and_stays_empty(workspace: Workspace) -> None:
    assert list_sessions(workspace) == []
    assert list(workspace.root.iterdir()) == []


def test_a_session_is_told_with_all_that_it_holds(workspace: Workspace) -> None:
    session = create_session(workspace, "dog")
    session.update_record(base_model="micro")
    session.add_run({"verb": "train"})
    for folder, name in [("instance_images", "a.png"), ("instance_images", ".hidden.png")]:
        (session.folder / folder).mkdir(exist_ok=True)
        (session.folder / folder / name).write_bytes(b"12345")
    session.captions_dir.mkdir()
    (session.captions_dir / "a.txt").touch()
    for step in ("step-000500", "step-001000", ".step-000600.part", "notes"):
        (session.checkpoints_dir / step).mkdir(parents=True)
    (session.folder / "dog.safetensors").touch()
    with hold(session.folder, "train"):
        shown = show_session(workspace, "dog")
    assert (shown.name, shown.base_model, shown.pictures, shown.captions) == ("dog", "micro", 1, 1)
    assert (shown.steps, shown.models, shown.packed) == ((500, 1000), ("dog.safetensors",), False)
    assert shown.runs[0].endswith(" train")
    assert shown.in_use[0].startswith("train on this machine")
    assert shown.size_bytes == 10 + session.record_path.stat().st_size
    assert json.loads(json.dumps(shown.as_json()))["steps"] == [500, 1000]
    assert "saved steps: 500, 1000" in shown.lines()
    assert shown.line().startswith("dog: 1 pictures, step 1000, 1 models, updated 20")
    (listed,) = list_sessions(workspace)
    assert (listed.in_use, listed.size_bytes) == ((), None)


def test_a_session_of_the_established_notebook_is_told_and_not_touched(
    workspace: Workspace,
) -> None:
    folder = workspace.sessions_dir / "Rex & me"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "instance_images.zip", "w") as archive:
        archive.writestr("instance_images/a.png", "x")
    for name in ("Rex & me.ckpt", "Rex & me_step_500.ckpt"):
        (folder / name).touch()
    shown = show_session(workspace, "Rex & me")
    assert shown.packed is True
    assert shown.models == ("Rex & me.ckpt", "Rex & me_step_500.ckpt")
    assert shown.line() == "Rex & me: pictures in a zip, not trained, 2 models"
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("record", ["{", '{"schema_version": 9, "runs": []}'])
def test_a_damaged_one_is_told_beside_the_others(workspace: Workspace, record: str) -> None:
    create_session(workspace, "cat")
    create_session(workspace, "dog").record_path.write_text(record)
    cat, dog = list_sessions(workspace)
    assert cat.problem == ""
    assert "damaged" in dog.line()
    assert any(line.startswith("problem: ") for line in show_session(workspace, "dog").lines())


def test_a_session_that_is_not_there_is_told(workspace: Workspace) -> None:
    with pytest.raises(SessionError, match="no session 'dog'"):
        show_session(workspace, "dog")


def test_a_drive_that_dropped_is_a_typed_error(flaky: Any) -> None:
    workspace = Workspace(flaky.root)
    create_session(workspace, "dog")
    flaky.fail("list", 107)
    with pytest.raises(StorageLostError, match="mount it again"):
        list_sessions(workspace)
