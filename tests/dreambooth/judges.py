"""Tiny random DINO and CLIP, as folders that load through the code of the real ones."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from colabtools import micro

SIDE = 32
_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
_VISION = {**_SMALL, "image_size": SIDE, "patch_size": 8}


def make_dino(folder: Path) -> Path:
    """Write a vision transformer without pooler, as the published one is."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        ViTModel(ViTConfig(**_VISION), add_pooling_layer=False).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessorPil(size=size).save_pretrained(folder)
    return folder


def make_clip(folder: Path) -> Path:
    """Write a CLIP with the embedded model's tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(micro.sd_path() / "tokenizer")
    text = {
        **_SMALL,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        config = CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=12)
        CLIPModel(config).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
