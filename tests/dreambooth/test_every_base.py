"""Every kind of base model is trained, resumed and drawn from, by the same trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from colabtools import drive
from colabtools.dreambooth import loop
from colabtools.dreambooth.config import PrepareConfig
from colabtools.dreambooth.dataset import prepare
from colabtools.dreambooth.drawing import draw
from colabtools.dreambooth.generate import load_trained_pipeline
from colabtools.dreambooth.session import open_session
from colabtools.dreambooth.state import CheckpointStore, latest_trained
from colabtools.dreambooth.train import train
from colabtools.dreambooth.train_config import TrainConfig
from colabtools.errors import ConfigError

from .tiny import make_tiny

TRAINED: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "sd1": ("sd1", {"method": "full"}, {"text_encoder", "unet"}),
    "sd2": ("sd2", {"method": "dora"}, {"text_encoder_lora", "unet_lora"}),
    "sd2-v": ("sd2-v", {"method": "full", "zero_terminal_snr": True, "min_snr_gamma": 5.0},
              {"text_encoder", "unet"}),
    "sdxl-full": ("sdxl", {"method": "full", "text_encoder_steps": 1},
                  {"text_encoder", "text_encoder_2", "unet"}),
    "sdxl-lora": ("sdxl", {"text_encoder_steps": 0}, {"unet_lora"}),
    "flux-dev": ("flux-dev", {"text_encoder_steps": 0}, {"transformer_lora"}),
    "flux-schnell": ("flux-schnell", {"text_encoder_steps": 0}, {"transformer_lora"}),
}  # fmt: skip

# One of each kind of prediction; the others are in the heavy tier.
QUICK = {"sd2-v", "sdxl-lora", "flux-schnell"}


class Killed(BaseException):
    """Nothing in the package catches this."""


def make_workspace(folder: Path) -> drive.Workspace:
    workspace = drive.open_local(folder)
    prepare(workspace, "any", PrepareConfig(images="demo"))
    return workspace


@pytest.mark.slow
# Of diffusers' own schedulers.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "changes", "parts"),
    [
        pytest.param(*row, id=name, marks=[] if name in QUICK else pytest.mark.heavy)
        for name, row in TRAINED.items()
    ],
)
def test_a_base_model_is_trained_resumed_and_drawn_from(
    kind: str,
    changes: dict[str, Any],
    parts: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = make_tiny(kind, tmp_path / kind)
    config = TrainConfig(
        **{
            "base_model": str(base), "text_encoder_steps": 1, "unet_steps": 2, "unet_lr": 1e-3,
            "batch_size": 2, "lora_rank": 2, "checkpoint_every": 1, "allow_resolution": True,
            **changes,
        }
    )  # fmt: skip
    calm, stormy = make_workspace(tmp_path / "calm"), make_workspace(tmp_path / "stormy")
    weights = train(calm, "any", config).weights
    assert set(weights.load()) == parts
    backward, left = loop.StageLoop._backward, [2 if config.text_encoder_steps else 1]

    def dying(self: loop.StageLoop, *args: Any) -> torch.Tensor:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return backward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.StageLoop, "_backward", dying)
        with pytest.raises(Killed):
            train(stormy, "any", config)
    assert CheckpointStore(open_session(stormy, "any")).newest() is not None
    assert train(stormy, "any", config).weights.files == weights.files
    pipeline = load_trained_pipeline(latest_trained(open_session(calm, "any")))
    if config.zero_terminal_snr:
        assert pipeline.scheduler.alphas_cumprod[-1] == 0
    picture = draw(pipeline, "a sks star", seed=0, num_inference_steps=1)
    assert picture.size[0] >= 64


def test_a_resolution_that_the_base_does_not_support_is_refused(tmp_path: Path) -> None:
    base = make_tiny("sd1", tmp_path / "sd1")
    config = TrainConfig(base_model="sd-1.5", text_encoder_steps=1, unet_steps=1)
    with pytest.raises(ConfigError, match="resolution is 64.*512"):
        train(make_workspace(tmp_path / "w"), "any", config)
    assert base.is_dir()
