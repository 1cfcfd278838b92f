from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from colabtools.dreambooth import state
from colabtools.dreambooth.session import Session
from colabtools.errors import CheckpointError, WorkspaceError

PARTS = {"unet": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([0.1])}}


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session("robot", tmp_path)


def test_weights_come_back_to_the_bit(session: Session) -> None:
    saved = state.save_trained(session, 12, PARTS, {"base_model": "micro"})
    found = state.latest_trained(session)
    assert found == saved
    assert (found.step, found.manifest["base_model"]) == (12, "micro")
    assert found.folder.name == "step-000012"
    loaded = found.load()
    assert loaded.keys() == PARTS.keys()
    assert all(loaded["unet"][name].equal(t) for name, t in PARTS["unet"].items())


def test_the_newest_is_the_one_saved_last_not_the_one_of_most_steps(session: Session) -> None:
    state.save_trained(session, 500, PARTS, {})
    manifest = session.checkpoints_dir / "step-000500" / "manifest.json"
    old = {**json.loads(manifest.read_text()), "saved": "2020-01-01T00:00:00+00:00"}
    manifest.write_text(json.dumps(old))
    state.save_trained(session, 100, PARTS, {})
    assert [weights.step for weights in state.find_trained(session)] == [500, 100]


def test_saving_the_same_step_again_replaces_it(session: Session) -> None:
    state.save_trained(session, 3, PARTS, {})
    state.save_trained(session, 3, {"unet": {"a": torch.ones(1)}}, {})
    assert state.latest_trained(session).load()["unet"].keys() == {"a"}
    assert [path.name for path in session.checkpoints_dir.iterdir()] == ["step-000003"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_found_and_named(session: Session, damage: str) -> None:
    path = state.save_trained(session, 3, PARTS, {}).folder / "unet.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-4])
    with pytest.raises(CheckpointError, match=r"unet\.safetensors is missing or damaged"):
        state.latest_trained(session).load()


def test_a_kill_between_the_two_renames_loses_nothing(session: Session) -> None:
    folder = state.save_trained(session, 3, PARTS, {}).folder
    folder.rename(folder.with_name(".step-000003.old"))
    (session.checkpoints_dir / ".step-000004.part").mkdir()
    assert state.latest_trained(session).load()["unet"].keys() == {"a", "b"}
    state.save_trained(session, 3, {"unet": {"a": torch.ones(1)}}, {})
    assert state.latest_trained(session).load()["unet"].keys() == {"a"}
    assert [path.name for path in session.checkpoints_dir.iterdir()] == ["step-000003"]


def test_a_folder_without_a_manifest_does_not_count(session: Session) -> None:
    (session.checkpoints_dir / "step-000009").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="'robot' has no trained weights; run train first"):
        state.latest_trained(session)


def test_a_full_disk_leaves_the_former_weights(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.save_trained(session, 3, PARTS, {})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(state, "write_atomic", full)
    with pytest.raises(WorkspaceError, match="No space left"):
        state.save_trained(session, 3, {"unet": {"a": torch.ones(1)}}, {})
    assert state.latest_trained(session).load()["unet"].keys() == {"a", "b"}
    assert [path.name for path in session.checkpoints_dir.iterdir()] == ["step-000003"]


SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from colabtools.dreambooth import state
from colabtools.dreambooth.session import Session
session = Session("robot", Path(sys.argv[1]))
for number in range(10**6):
    state.save_trained(session, 5, {"unet": {"a": torch.full((200_000,), float(number))}}, {})
    print(number, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.011, 0.023, 0.037, 0.05])
def test_a_kill_in_the_middle_of_saving_leaves_whole_weights(
    session: Session, delay_s: float
) -> None:
    command = [sys.executable, "-c", SAVE_FOREVER, str(session.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(delay_s)
        child.send_signal(signal.SIGKILL)
    values = state.latest_trained(session).load()["unet"]["a"]
    assert bool((values == values[0]).all())
