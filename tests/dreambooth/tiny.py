"""Random models with the topology of the real ones: the same names and depth, tiny widths.

Each is a folder in diffusers' layout. The CLIP tokenizer is the embedded model's.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from colabtools import micro

KINDS = ("sd1", "sd2", "sd2-v", "sdxl", "flux-dev", "flux-schnell")
CLIP_VOCAB = 632
WIDTH = 16

# Source of every structural value: the configuration files of the published repositories.
_SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_CROSS_DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
_CROSS_UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3


def make_tiny(kind: str, folder: Path) -> Path:
    """Write a model of one of `KINDS`; the same weights every time."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        pipeline = {"sd1": _sd, "sd2": _sd, "sdx": _sdxl, "flu": _flux}[kind[:3]](kind)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _sd(kind: str) -> Any:
    v1 = kind == "sd1"
    unet = diffusers.UNet2DConditionModel(
        sample_size=12 if kind == "sd2-v" else 8,
        block_out_channels=(8, 16, 32, 32),
        down_block_types=_CROSS_DOWN,
        up_block_types=_CROSS_UP,
        attention_head_dim=8 if v1 else (1, 2, 4, 4),
        use_linear_projection=not v1,
        cross_attention_dim=WIDTH,
        norm_num_groups=4,
    )
    scheduler = diffusers.PNDMScheduler(
        **_SCHEDULE,
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type="v_prediction" if kind == "sd2-v" else "epsilon",
    )
    return diffusers.StableDiffusionPipeline(
        vae=_vae(0.18215),
        text_encoder=_clip(transformers.CLIPTextModel, 12 if v1 else 23, openclip=not v1),
        tokenizer=_clip_tokenizer(openclip=not v1),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(_: str) -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(1, 2, 4),
        use_linear_projection=True,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        norm_num_groups=4,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(0.13025),
        text_encoder=_clip(transformers.CLIPTextModel, 12),
        text_encoder_2=_clip(transformers.CLIPTextModelWithProjection, 32, openclip=True),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(openclip=True),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**_SCHEDULE, steps_offset=1),
        force_zeros_for_empty_prompt=True,
    )


def _flux(kind: str) -> Any:
    dev = kind == "flux-dev"
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=dev,
        axes_dims_rope=(2, 2, 4),
    )
    return diffusers.FluxPipeline(
        vae=_vae(0.3611, latent_channels=16, shift_factor=0.1159, convolutions=False),
        text_encoder=_clip(transformers.CLIPTextModel, 12),
        text_encoder_2=_t5(),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_t5_tokenizer(),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0 if dev else 1.0, use_dynamic_shifting=dev
        ),
    )


def _vae(
    scaling_factor: float,
    *,
    latent_channels: int = 4,
    shift_factor: float | None = None,
    convolutions: bool = True,
) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=convolutions,
        use_post_quant_conv=convolutions,
    )


def _clip(model: Any, layers: int, *, openclip: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=CLIP_VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_attention_heads=2,
        num_hidden_layers=layers,
        projection_dim=WIDTH,
        hidden_act="gelu" if openclip else "quick_gelu",
        bos_token_id=CLIP_VOCAB - 2,
        eos_token_id=CLIP_VOCAB - 1,
        pad_token_id=0 if openclip else CLIP_VOCAB - 1,
    )
    return model(config).eval()


def _clip_tokenizer(*, openclip: bool = False) -> Any:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(micro.sd_path() / "tokenizer")
    if openclip:
        tokenizer.pad_token = "!"
    return tokenizer


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=len(_T5_PIECES) + 3,
        d_model=WIDTH,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_heads=2,
        num_layers=24,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return transformers.T5EncoderModel(config).eval()


# Words first: a piece is the likelier the earlier it stands.
_T5_PIECES = ["▁a", "▁star", "▁on", "▁photo", "▁of", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789-,"]


def _t5_tokenizer() -> Any:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(piece, -float(i) / 8 - 1) for i, piece in enumerate(_T5_PIECES)]
    return transformers.T5Tokenizer(vocab=[*special, *pieces], extra_ids=0, model_max_length=32)
