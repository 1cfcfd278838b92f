from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil


@pytest.fixture
def write_vit(tmp_path: Path) -> Callable[..., Path]:
    """Write a ViT with random weights and two labels, as transformers does; returns its folder."""

    def write(name: str = "model", processor: dict[str, object] | None = None, **sizes) -> Path:
        torch.manual_seed(0)
        config = ViTConfig(
            **{
                "image_size": 32,
                "patch_size": 8,
                "hidden_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "intermediate_size": 96,
                "initializer_range": 0.2,
                "id2label": {0: "cat", 1: "dog", 2: "Ente, wild"},
                "label2id": {"cat": 0, "dog": 1, "Ente, wild": 2},
            }
            | sizes
        )
        side = config.image_size
        made = ViTImageProcessorPil(**(processor or {"size": {"height": side, "width": side}}))
        ViTForImageClassification(config).save_pretrained(tmp_path / name)
        made.save_pretrained(tmp_path / name)
        return tmp_path / name

    return write
