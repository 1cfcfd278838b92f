"""A random Stable Diffusion 1.x, narrow but with every tensor of the real one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel


class Parts(NamedTuple):
    """The three networks and, by their names, the tensors of each."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel

    def tensors(self) -> dict[str, Mapping[str, torch.Tensor]]:
        return {name: getattr(self, name).state_dict() for name in self._fields}


def build_parts() -> Parts:
    """SD 1.5's topology: as in the real one the width grows twice and then stays."""
    torch.manual_seed(7)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 32, 32),
        attention_head_dim=4,
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 8, 16, 16),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=64,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=632,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=12,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=630,
            eos_token_id=631,
        )
    )
    parts = Parts(unet, vae, text_encoder)
    with torch.no_grad():
        # Biases and norms begin as 0 and 1; random, no two tensors can be mistaken for each other.
        for tensor in (tensor for part in parts for tensor in part.parameters()):
            tensor.copy_(torch.randn(tensor.shape))
    return parts


@pytest.fixture(scope="session")
def parts() -> Parts:
    return build_parts()
