"""Adapters through the door that models go through: converted by themselves, or merged."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from colabtools.checkpoints.convert import ConvertConfig, convert
from colabtools.errors import CheckpointError

from .conftest import ModelOf, file_content
from .test_convert import back, part_file


@pytest.fixture
def adapter(model: ModelOf, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The file that diffusers saves of a random adapter, and the UNet with it merged by PEFT."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(model("sd1"), subfolder="unet")
    unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_out.0"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    state = get_peft_model_state_dict(unet)
    settings = unet.peft_config["default"].to_dict()
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=settings
    )
    unet.fuse_lora()
    unet.unload_lora()
    return tmp_path / "pytorch_lora_weights.safetensors", unet.state_dict()


def test_an_adapter_gets_the_names_of_the_web_uis_and_its_own_back(
    adapter: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    there = convert(adapter[0], tmp_path / "kohya.safetensors")
    assert there.family == "sd1"
    assert all(name.startswith("lora_unet_") for name in file_content(there.path))
    again = convert(there.path, tmp_path / "peft.safetensors")
    assert file_content(again.path) == file_content(adapter[0])
    with pytest.raises(CheckpointError, match="is a LoRA, of which only the dtype"):
        convert(adapter[0], tmp_path / "x.safetensors", ConvertConfig(ema=True))


@pytest.mark.parametrize("single", [False, True])
def test_an_adapter_is_merged_while_the_model_is_converted(
    adapter: tuple[Path, dict[str, torch.Tensor]], model: ModelOf, tmp_path: Path, single: bool
) -> None:
    source = model("sd1")
    if single:
        source = convert(source, tmp_path / "plain.safetensors").path
    merged = convert(source, tmp_path / "m.safetensors", ConvertConfig(merge=(str(adapter[0]),)))
    folder = back(merged.path, tmp_path / "folder", model("sd1")).path
    found, plain = load_file(part_file(folder, "unet")), load_file(part_file(model("sd1"), "unet"))
    assert found.keys() == adapter[1].keys()
    for name, tensor in adapter[1].items():
        assert torch.allclose(found[name], tensor, atol=1e-5)
        assert found[name].equal(plain[name]) == (
            ".to_q." not in name and ".to_out.0.w" not in name
        )
