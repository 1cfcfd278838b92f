"""A program: trains with bitsandbytes itself on the CPU, once in one go and once stopped half-way.

bitsandbytes has CPU kernels for its 8-bit optimizer and its 4-bit weights. What is switched off
here are the gates before them: ours, because on a CPU they gain nothing, and those of diffusers
and transformers, which ask for a card. Prints a JSON object for the test that starts it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.nn.modules
import torch
from diffusers.quantizers.bitsandbytes import bnb_quantizer as of_diffusers
from tiny import make_tiny
from transformers.quantizers import quantizer_bnb_4bit as of_transformers

from colabtools import drive
from colabtools.dreambooth import loop, models, optimizers
from colabtools.dreambooth.config import PrepareConfig
from colabtools.dreambooth.dataset import prepare
from colabtools.dreambooth.train import Trained, train
from colabtools.dreambooth.train_config import TrainConfig

STEPS = {"text_encoder_steps": 0, "unet_steps": 4, "checkpoint_every": 1}
STEPS |= {"batch_size": 1, "allow_resolution": True}


def open_gates() -> None:
    optimizers._obstacle_to_8bit = lambda device: ""
    models._check_quantize = lambda quantize, device: None
    of_diffusers.BnB4BitDiffusersQuantizer.validate_environment = lambda *_, **__: None
    of_diffusers.BnB4BitDiffusersQuantizer.update_device_map = lambda *_: {"": "cpu"}
    of_transformers.Bnb4BitHfQuantizer.validate_environment = lambda *_, **__: None
    # Its packing for AVX-512 wants wider layers than the tiny model has.
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False


def run(folder: Path, config: TrainConfig, stop_at: int | None = None) -> Trained:
    workspace = drive.open_local(folder)
    photos = PrepareConfig(
        images="demo", base_model=config.base_model, resolution=64, allow_resolution=True
    )
    prepare(workspace, "robot", photos)
    if stop_at is not None:
        step = loop.StageLoop.step

        def until(self: loop.StageLoop, world: Any) -> None:
            if self.update == stop_at:
                raise KeyboardInterrupt
            step(self, world)

        loop.StageLoop.step = until
        try:
            train(workspace, "robot", config)
        except KeyboardInterrupt:
            loop.StageLoop.step = step
    return train(workspace, "robot", config)


def compare(folder: Path, config: TrainConfig) -> dict[str, Any]:
    calm, stopped = run(folder / "calm", config), run(folder / "stopped", config, stop_at=2)
    mine, other = calm.weights.load(), stopped.weights.load()
    names = [(part, name) for part in mine for name in mine[part]]
    return {
        "equal": all(torch.equal(mine[part][name], other[part][name]) for part, name in names),
        "tensors": len(names),
        "losses": [metric.loss for metric in calm.metrics],
        "same_losses": calm.metrics == stopped.metrics,
    }


def main(folder: Path) -> None:
    open_gates()
    flux = str(make_tiny("flux-dev", folder / "flux"))
    lora = TrainConfig(base_model=flux, method="lora", lora_rank=4, quantize="none", **STEPS)
    packed = TrainConfig(base_model=flux, method="lora", lora_rank=4, quantize="nf4", **STEPS)
    eight = TrainConfig(optimizer="adamw8bit", **STEPS)
    results = {
        "8-bit": compare(folder / "8-bit", eight),
        "fp32": compare(folder / "fp32", TrainConfig(optimizer="adamw", **STEPS)),
        "nf4": compare(folder / "nf4", packed),
        "whole": compare(folder / "whole", lora),
    }
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
