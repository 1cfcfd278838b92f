"""Several processes train as one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from colabtools import drive
from colabtools.dreambooth.config import PrepareConfig
from colabtools.dreambooth.dataset import prepare
from colabtools.dreambooth.session import open_session
from colabtools.dreambooth.state import latest_trained
from colabtools.dreambooth.train import train
from colabtools.dreambooth.train_config import TrainConfig
from colabtools.dreambooth.world import World, join_world

from .conftest import SESSION

CONFIG = TrainConfig(
    text_encoder_steps=2,
    unet_steps=3,
    # AdamW turns the sign of a gradient that is rounding alone, as that of an attention's key bias,
    # into a step of the whole rate: 2e-6 of the embedded model's own 3e-4.
    text_encoder_lr=2e-5,
    unet_lr=2e-5,
    batch_size=2,
    prior_preservation=True,
    class_prompt="a star",
    num_class_images=2,
    checkpoint_every=2,
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(workspace: drive.Workspace, processes: int, *options: str) -> None:
    """Train in several processes with gloo; on GPUs `accelerate launch` does the same."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
        "--master_port", str(free_port()), "-m", "colabtools.cli",
        "--workspace", str(workspace.root), "dreambooth", "train", "--session", SESSION, *options,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_two_processes_of_one_picture_equal_one_process_of_two(tmp_path: Path) -> None:
    alone, together = (drive.open_local(tmp_path / name) for name in ("alone", "together"))
    for workspace in (alone, together):
        prepare(workspace, SESSION, PrepareConfig(images="demo"))
    one = train(alone, SESSION, CONFIG)
    options = [
        f"--{name.replace('_', '-')}={getattr(CONFIG, name)}"
        for name in (
            "checkpoint_every", "num_class_images", "text_encoder_lr", "text_encoder_steps",
            "unet_lr", "unet_steps",
        )
    ]  # fmt: skip
    launch(together, 2, *options, "--batch-size=1", "--prior-preservation", "--class-prompt=a star")
    session = open_session(together, SESSION)
    lines = (session.logs_dir / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses == pytest.approx([m.loss for m in one.metrics], abs=1e-6)
    two = latest_trained(session).load()
    for part, tensors in one.weights.load().items():
        for name, tensor in tensors.items():
            gap = float((tensor - two[part][name]).abs().max())
            assert gap <= 1e-6, f"{part}.{name} differs by {gap}"
    assert [run["verb"] for run in session.read_record()["runs"]] == ["train"]


def test_alone_nothing_is_shared_and_nothing_added() -> None:
    world = join_world()
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.share([1, 2, 3]) == [1, 2, 3]
    tensor = torch.ones(3)
    world.add_up([tensor])
    world.wait()
    assert tensor.equal(torch.ones(3))
    assert (world.any(True), world.any(False), world.agree("x")) == (True, False, "x")


def test_shares_are_disjoint_and_complete() -> None:
    device = torch.device("cpu")
    shares = [World(rank=rank, size=3, device=device).share(range(10)) for rank in range(3)]
    assert sorted(row for share in shares for row in share) == list(range(10))
    assert replace(World(rank=2, size=3, device=device), rank=0).is_main
