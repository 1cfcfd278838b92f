from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from colabtools import drive
from colabtools.dreambooth.config import PrepareConfig
from colabtools.dreambooth.dataset import prepare
from colabtools.dreambooth.train import Trained, train
from colabtools.dreambooth.train_config import TrainConfig

SESSION = "robot"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The embedded model is too small for two threads to help, and sums keep their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def workspace(tmp_path: Path) -> drive.Workspace:
    """A workspace with one prepared session."""
    workspace = drive.open_local(tmp_path / "work space")
    prepare(workspace, SESSION, PrepareConfig(images="demo"))
    return workspace


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[drive.Workspace, Trained]:
    """A workspace with a session trained for a few steps with prior preservation; only read it."""
    workspace = drive.open_local(tmp_path_factory.mktemp("trained"))
    prepare(workspace, SESSION, PrepareConfig(images="demo"))
    config = TrainConfig(
        text_encoder_steps=3,
        unet_steps=4,
        batch_size=2,
        prior_preservation=True,
        class_prompt="a star",
        num_class_images=2,
    )
    return workspace, train(workspace, SESSION, config)
