from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from peft import LoraConfig
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from colabtools.dreambooth import activations
from colabtools.errors import ModelError

GIB = 2**30

# The true sizes. Source: config.json of each model's repository, as far as it differs from the
# defaults of the class.
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FLUX_DEV = {"guidance_embeds": True}
TINY = {
    "sample_size": 8,
    "cross_attention_dim": 32,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}

Call = Callable[[nn.Module], torch.Tensor]


def make_unet(config: dict, device: str = "meta") -> UNet2DConditionModel:
    with torch.device(device):
        return UNet2DConditionModel(**config)


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def sd(side: int, batch: int = 1, width: int = 768) -> Call:
    """The forward pass of a Stable Diffusion UNet at a side in pixels."""
    latents, steps = empty(batch, 4, side // 8, side // 8), empty(batch)
    return lambda unet: unet(latents, steps, empty(batch, 77, width)).sample


def sdxl(side: int) -> Call:
    added = {"text_embeds": empty(1, 1280), "time_ids": empty(1, 6)}
    latents = empty(1, 4, side // 8, side // 8)
    return lambda unet: unet(latents, empty(1), empty(1, 77, 2048), added_cond_kwargs=added).sample


def flux(side: int) -> Call:
    tokens, text = (side // 16) ** 2, 512
    inputs = {
        "hidden_states": empty(1, tokens, 64),
        "encoder_hidden_states": empty(1, text, 4096),
        "pooled_projections": empty(1, 768),
        "timestep": empty(1),
        "img_ids": empty(tokens, 3),
        "txt_ids": empty(text, 3),
        "guidance": empty(1),
    }
    return lambda transformer: transformer(**inputs).sample


def make_lora(cls: type, config: dict) -> nn.Module:
    """A frozen network in half precision with fp32 adapters of rank 16 on its attention."""
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            network = cls(**config).requires_grad_(False)
            network.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=targets))
    finally:
        torch.set_default_dtype(default)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return network


@cache
def measure_sd15(side: int, checkpointing: bool) -> int:
    return activations.measure_activations(
        partial(make_unet, SD15), sd(side), gradient_checkpointing=checkpointing
    )


def measure_tiny(
    batch: int = 1, side: int = 64, checkpointing: bool = False, half: bool = True
) -> int:
    return activations.measure_activations(
        partial(make_unet, TINY),
        sd(side, batch, width=32),
        gradient_checkpointing=checkpointing,
        half_precision=half,
    )


@pytest.mark.parametrize(("side", "kept", "checkpointed"), [(512, 1.16, 0.17), (768, 2.60, 0.38)])
def test_sd15_keeps_what_others_counted(side: int, kept: float, checkpointed: float) -> None:
    assert measure_sd15(side, False) / GIB == pytest.approx(kept, rel=0.01)
    assert measure_sd15(side, True) / GIB == pytest.approx(checkpointed, abs=0.006)


def test_sdxl_keeps_what_others_counted() -> None:
    kept = activations.measure_activations(
        partial(make_unet, SDXL), sdxl(1024), gradient_checkpointing=False
    )
    assert kept / GIB == pytest.approx(8.05, rel=0.01)


# The rows that the planner's tests stand on.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "config", "call", "expected"),
    [
        (UNet2DConditionModel, SDXL, sdxl(1024), (23_224_320, 2_567_463_684, 7.71e9, 0.556e9)),
        (FluxTransformer2DModel, FLUX_DEV, flux(512), (18_677_760, 11_901_408_320, 9.88e9, 0.55e9)),
    ],
)
def test_a_lora_of_true_size_is_counted_from_its_config(
    cls: type, config: dict, call: Call, expected: tuple[float, ...]
) -> None:
    need = activations.measure_need(partial(make_lora, cls, config), call, optimizer_bytes={})
    assert (need.trainable_params, need.frozen_params) == expected[:2]
    assert need.activation_bytes == pytest.approx(expected[2], rel=0.01)
    assert need.checkpointed_activation_bytes == pytest.approx(expected[3], rel=0.01)


def test_more_pictures_keep_more_in_proportion() -> None:
    one, two = measure_tiny(batch=1), measure_tiny(batch=2)
    # The table of sines for the timestep is made once for a whole batch.
    assert two == pytest.approx(2 * one, rel=1e-4)


def test_larger_pictures_keep_more() -> None:
    sizes = [measure_tiny(side=side) for side in (64, 96, 128)]
    assert sizes == sorted(set(sizes))
    assert measure_sd15(768, False) > measure_sd15(512, False)


def test_gradient_checkpointing_keeps_less_and_can_be_undone() -> None:
    unet = make_unet(TINY)
    measure = partial(
        activations.measure_activations, lambda: unet, sd(64, width=32), half_precision=True
    )
    before = measure(gradient_checkpointing=False)
    assert measure(gradient_checkpointing=True) < before / 2
    assert measure(gradient_checkpointing=False) == before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_count_is_what_a_real_pass_keeps(checkpointing: bool) -> None:
    unet = make_unet(TINY, "cpu").train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    kept: dict[int, int] = {}
    holding = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        holding.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 77, 32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = unet(*inputs).sample
    assert output.requires_grad
    for parameter in unet.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    counted = measure_tiny(batch=2, checkpointing=checkpointing, half=False)
    assert counted == pytest.approx(sum(kept.values()), rel=0.01)


def test_autocast_keeps_fewer_bytes_than_fp32() -> None:
    assert measure_tiny(half=True) < 0.8 * measure_tiny(half=False)


def test_the_gradients_of_a_text_encoder_flow_through_the_frozen_unet() -> None:
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=32, intermediate_size=64, num_hidden_layers=2
    )

    def build(*, encoder: bool, unet: bool) -> nn.Module:
        with torch.device("meta"):
            networks = {"text_encoder": CLIPTextModel(text), "unet": make_unet(TINY)}
        networks["text_encoder"].requires_grad_(encoder)
        networks["unet"].requires_grad_(unet)
        return nn.ModuleDict(networks)

    def call(networks: nn.Module) -> torch.Tensor:
        tokens = torch.zeros(1, 77, dtype=torch.long, device="meta")
        hidden = networks["text_encoder"](tokens).last_hidden_state
        return networks["unet"](empty(1, 4, 8, 8), empty(1), hidden).sample

    def measure(encoder: bool, unet: bool, checkpointing: bool = False) -> int:
        return activations.measure_activations(
            partial(build, encoder=encoder, unet=unet), call, gradient_checkpointing=checkpointing
        )

    first_stage, second_stage, joint = (
        measure(True, False),
        measure(False, True),
        measure(True, True),
    )
    encoder_alone = activations.measure_activations(
        partial(build, encoder=True, unet=False),
        lambda networks: (
            networks["text_encoder"](
                torch.zeros(1, 77, dtype=torch.long, device="meta")
            ).last_hidden_state
        ),
        gradient_checkpointing=False,
    )
    assert 2 * encoder_alone < first_stage < joint
    assert second_stage < joint
    assert measure(True, False, checkpointing=True) < first_stage / 2


def test_a_loaded_network_is_copied_to_meta_without_its_weights() -> None:
    unet = make_unet(TINY, "cpu")
    unet.conv_in.requires_grad_(False)
    shadow = activations.copy_to_meta(unet)
    assert {p.device.type for p in shadow.parameters()} == {"meta"}
    assert {p.device.type for p in unet.parameters()} == {"cpu"}
    learns = {name: p.requires_grad for name, p in unet.named_parameters()}
    assert {name: p.requires_grad for name, p in shadow.named_parameters()} == learns
    assert learns["conv_in.weight"] is False
    unet.requires_grad_(True)
    whole = activations.measure_activations(
        lambda: activations.copy_to_meta(unet), sd(64, width=32), gradient_checkpointing=False
    )
    assert whole == measure_tiny()


def test_the_need_of_a_stage_is_counted_in_one_call() -> None:
    unet = make_unet(TINY)
    unet.down_blocks.requires_grad_(False)
    need = activations.measure_need(
        lambda: unet, sd(64, width=32), optimizer_bytes={"adamw": 1}, frozen_bytes_per_param=4
    )
    frozen = sum(p.numel() for p in unet.down_blocks.parameters())
    assert need.frozen_params == frozen
    assert need.trainable_params == sum(p.numel() for p in unet.parameters()) - frozen
    assert 0 < need.checkpointed_activation_bytes < need.activation_bytes < measure_tiny()
    assert (need.optimizer_bytes, need.frozen_bytes_per_param) == ({"adamw": 1}, 4)


def test_a_network_in_which_nothing_learns_is_refused() -> None:
    with pytest.raises(ModelError, match=r"no weight of UNet2DConditionModel .* requires_grad"):
        activations.measure_activations(
            lambda: make_unet(TINY).requires_grad_(False),
            sd(64, width=32),
            gradient_checkpointing=False,
        )


def test_a_network_without_gradient_checkpointing_is_named() -> None:
    with pytest.raises(ModelError, match="Linear has no gradient checkpointing"):
        activations.measure_activations(
            lambda: nn.Linear(2, 2, device="meta"),
            lambda layer: layer(empty(1, 2)),
            gradient_checkpointing=True,
        )
