"""The space manager: nothing goes before the second word, and then what was shown."""

from __future__ import annotations

import pytest

from colabtools import env
from colabtools.dreambooth.session import Session, session_names
from colabtools.dreambooth.widgets import SpaceManager, manage_space
from colabtools.drive import Workspace


@pytest.fixture
def manager(workspace: Workspace, session: Session) -> SpaceManager:
    for step in ("step-000100", "step-000200"):
        state = session.checkpoints_dir / step
        state.mkdir(parents=True)
        (state / "model.safetensors").write_bytes(bytes(2_000_000))
    session.samples_dir.mkdir()
    (session.samples_dir / "grid.png").write_bytes(bytes(1000))
    manager = SpaceManager(workspace)
    manager.measure_button.click()
    return manager


def pick(manager: SpaceManager, *words: str) -> None:
    labels = [label for label, _ in manager.list.options]
    manager.list.value = [i for i, label in enumerate(labels) if any(w in label for w in words)]


def asks(manager: SpaceManager) -> bool:
    return manager.yes_button.layout.display != "none"


def test_it_measures_when_asked(workspace: Workspace, session: Session) -> None:
    manager = SpaceManager(workspace)
    assert manager.list.options == ()
    assert manager.free_button.disabled
    manager.measure_button.click()
    assert manager.list.options[0][0].startswith("dog: session")
    assert "free; pick what may go" in manager.state


def test_picking_and_the_first_word_remove_nothing(manager: SpaceManager, session: Session) -> None:
    pick(manager, "step-000100", "samples")
    assert not asks(manager)
    manager.free_button.click()
    assert asks(manager)
    assert "to be removed: dog: state step-000100, 2 MB (an older state); dog: samples" in (
        manager.state
    )
    assert (session.checkpoints_dir / "step-000100").is_dir()
    manager.no_button.click()
    assert not asks(manager)
    manager.free()
    assert (session.checkpoints_dir / "step-000100").is_dir()
    assert session.samples_dir.is_dir()


def test_the_second_word_frees_what_was_picked(manager: SpaceManager, session: Session) -> None:
    pick(manager, "step-000100", "samples")
    manager.free_button.click()
    manager.yes_button.click()
    assert "✓ freed 2 MB" in manager.state
    assert [path.name for path in session.checkpoints_dir.iterdir()] == ["step-000200"]
    assert not session.samples_dir.exists()
    assert session.instance_images_dir.is_dir()
    assert not any("samples" in label for label, _ in manager.list.options)
    assert not asks(manager)


def test_another_pick_takes_the_first_word_back(manager: SpaceManager, session: Session) -> None:
    pick(manager, "samples")
    manager.free_button.click()
    pick(manager, "dog: session")
    assert not asks(manager)
    manager.yes_button.click()
    assert session.samples_dir.is_dir()


def test_a_session_goes_by_way_of_the_trash(
    manager: SpaceManager, workspace: Workspace, session: Session
) -> None:
    pick(manager, "dog: session")
    manager.free_button.click()
    manager.yes_button.click()
    assert session_names(workspace) == []
    assert "more once the trash is emptied" in manager.state
    pick(manager, "trash,")
    manager.free_button.click()
    manager.yes_button.click()
    assert manager.list.options == ()
    assert not (workspace.sessions_dir / ".trash").exists()


def test_nothing_picked_asks_nothing(manager: SpaceManager) -> None:
    manager.free_button.click()
    assert not asks(manager)
    assert "nothing is picked" in manager.state


def test_what_fails_is_shown_and_the_list_is_of_now(
    manager: SpaceManager, session: Session
) -> None:
    import shutil

    pick(manager, "samples")
    manager.free_button.click()
    shutil.rmtree(session.samples_dir)
    manager.yes_button.click()
    assert "✗" in manager.state
    assert "measure again" in manager.state
    assert not any("samples" in label for label, _ in manager.list.options)


def test_where_nobody_looks_nothing_is_freed(
    workspace: Workspace, papermill: env.Probes, capsys: pytest.CaptureFixture[str]
) -> None:
    manage_space(workspace, probes=papermill)
    line = "no form is shown here (headless): nothing is measured or freed\n"
    assert capsys.readouterr().err == line
