"""What a run writes beside its states, where that fails or a kill comes before it."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from colabtools import drive
from colabtools.checkpoints.headers import read_safetensors_header
from colabtools.dreambooth import byproducts, monitor, run
from colabtools.dreambooth.monitor import Monitor
from colabtools.dreambooth.session import Session, open_session
from colabtools.dreambooth.state import CheckpointStore, find_trained
from colabtools.dreambooth.train import Trained, train
from colabtools.dreambooth.train_config import TrainConfig
from colabtools.errors import WorkspaceError

from .conftest import SESSION

CONFIG = TrainConfig(
    text_encoder_steps=2, unet_steps=4, batch_size=1, checkpoint_every=2, save_every=2
)


class Killed(BaseException):
    """Nothing in the package catches this."""


def go(workspace: drive.Workspace, **changes: Any) -> Trained:
    return train(workspace, SESSION, replace(CONFIG, **changes))


def killed_before(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, number: int
) -> Callable[[], None]:
    """Let the run die at that call; returns what undoes it."""
    real, left = getattr(place, name), [number]

    def dying(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, dying)
    return lambda: monkeypatch.setattr(place, name, real)


def logged_steps(session: Session) -> list[int]:
    lines = (session.logs_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.parametrize("number", [1, 3])
def test_a_model_file_that_a_kill_prevented_is_made_up_for(
    workspace: drive.Workspace, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    undo = killed_before(monkeypatch, byproducts, "write_step_file", number)
    with pytest.raises(Killed):
        go(workspace)
    undo()
    go(workspace)
    session = open_session(workspace, SESSION)
    files = sorted(session.folder.glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"{SESSION}_step_{step}.safetensors" for step in (2, 4, 6)
    ]
    sequences = {str(saved.sequence) for saved in find_trained(session)}
    assert {read_safetensors_header(path).metadata["sequence"] for path in files} <= sequences


def test_a_model_file_of_a_former_run_is_written_anew(workspace: drive.Workspace) -> None:
    go(workspace)
    path = open_session(workspace, SESSION).folder / f"{SESSION}_step_4.safetensors"
    before = path.read_bytes()
    go(workspace, seed=1, resume="never")
    assert path.read_bytes() != before
    written = path.stat().st_mtime_ns
    go(workspace, seed=1)
    assert path.stat().st_mtime_ns == written


def test_logs_and_record_are_whole_after_a_kill_at_the_very_end(
    workspace: drive.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = CheckpointStore.save

    def dying(self: CheckpointStore, snapshot: Any) -> Any:
        saved = saves(self, snapshot)
        if snapshot.finished:
            raise Killed
        return saved

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "save", dying)
        with pytest.raises(Killed):
            go(workspace)
    session = open_session(workspace, SESSION)
    assert logged_steps(session) == [1, 2, 3, 4, 5, 6]
    assert [r["verb"] for r in session.read_record()["runs"]] == []
    go(workspace)
    go(workspace)
    assert [(r["verb"], r["step"]) for r in session.read_record()["runs"]] == [("train", 6)]


def test_samples_are_drawn_before_the_state_that_is_behind_them(
    workspace: drive.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo = killed_before(monkeypatch, CheckpointStore, "save", 3)
    with pytest.raises(Killed):
        go(workspace, sample_every=4, sample_seeds=(0,))
    undo()
    assert (open_session(workspace, SESSION).samples_dir / "training" / "step-000004.png").is_file()


def test_a_place_that_takes_no_logs_does_not_end_the_run(
    workspace: drive.Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    session = open_session(workspace, SESSION)
    shutil.rmtree(session.logs_dir, ignore_errors=True)
    session.logs_dir.write_text("a file where the folder of logs belongs")
    assert len(go(workspace, save_every=0).metrics) == 6
    assert "the log of losses could not be written" in caplog.text
    assert session.read_record()["runs"][-1]["verb"] == "train"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.ENOTCONN])
def test_storage_that_fails_beside_the_states_does_not_end_the_run(
    workspace: drive.Workspace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise drive.workspace_error("write", Path("drive"), OSError(code, "gone"))

    expected = go(workspace).weights
    monkeypatch.setattr(byproducts, "write_step_file", failing)
    monkeypatch.setattr(Monitor, "write", failing)
    monkeypatch.setattr(monitor, "save_grid", failing)
    monkeypatch.setattr(Session, "add_run", failing)
    result = go(workspace, resume="never", sample_every=4, sample_seeds=(0,))
    for what in ("the log of losses", "the model file of a saved step", "the samples of step 4",
                 "the session's record"):  # fmt: skip
        assert f"{what} could not be written" in caplog.text
    assert result.weights.files == expected.files


def test_a_held_out_loss_without_memory_is_left_out(
    workspace: drive.Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    def full(*_: Any) -> float:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(monitor.HeldOut, "loss", full)
    assert len(go(workspace, heldout_images=1, save_every=0).metrics) == 6
    assert "too short to measure the held-out loss at step 2" in caplog.text


def test_memory_that_ends_before_the_first_update_is_one_line(
    workspace: drive.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from colabtools.errors import TrainingError

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left\nmore of it")

    monkeypatch.setattr(run, "load_models", full)
    with pytest.raises(TrainingError, match=r"before the first update \(no memory left\); use"):
        go(workspace)


def test_what_is_spared_is_no_mistake_of_ours() -> None:
    with byproducts.spared("a file"):
        raise WorkspaceError("full")
    with pytest.raises(TypeError), byproducts.spared("a file"):
        raise TypeError("wrong")
