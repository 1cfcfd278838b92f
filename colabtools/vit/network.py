"""A ViT in torch: one module for classes, features of any layer, and export.

It differs from transformers' in what it leaves out. Queries, keys and values are one product; and
where only the class token is asked for, the last block computes nothing of the others but their
keys and values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from colabtools.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from colabtools.vit.architecture import Architecture

__all__ = ["Block", "Vit", "build", "ensure_complete"]


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to its input."""

    def __init__(self, sizes: Architecture) -> None:
        """Make the layers, with the sizes of the architecture."""
        super().__init__()
        width = sizes.embed_dim
        self.num_heads = sizes.num_heads
        self.approximate = "tanh" if sizes.activation == "gelu_tanh" else "none"
        self.norm1 = nn.LayerNorm(width, sizes.eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, sizes.eps)
        self.fc1 = nn.Linear(width, sizes.mlp_dim)
        self.fc2 = nn.Linear(sizes.mlp_dim, width)

    def forward(self, x: torch.Tensor, only_class: bool = False) -> torch.Tensor:
        """Return tokens (B, T, D), or (B, 1, D) of the class token alone."""
        normed = self.norm1(x)
        if only_class:
            x = x[:, :1]
        x = x + self.proj(self._attend(normed, x.shape[1]))
        added: torch.Tensor = self.fc2(
            F.gelu(self.fc1(self.norm2(x)), approximate=self.approximate)
        )
        return x + added

    def _attend(self, x: torch.Tensor, queries: int) -> torch.Tensor:
        """Return what the first `queries` tokens gather from all."""
        batch, tokens, width = x.shape
        # (B, T, 3, heads, D / heads) -> three of (B, heads, T, D / heads)
        split = self.qkv(x).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        gathered = F.scaled_dot_product_attention(query[:, :, :queries], key, value)
        return gathered.transpose(1, 2).reshape(batch, queries, width)


class Vit(nn.Module):
    """The whole network.

    `table` (C, 256) turns levels of a pixel into values, so that it takes pictures as bytes.
    """

    table: torch.Tensor

    def __init__(self, sizes: Architecture) -> None:
        """Make the layers, with the sizes of the architecture."""
        super().__init__()
        self.sizes = sizes
        width = sizes.embed_dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, sizes.tokens, width))
        self.patch_embed = nn.Conv2d(sizes.in_chans, width, sizes.patch_size, sizes.patch_size)
        self.blocks = nn.ModuleList([Block(sizes) for _ in range(sizes.depth)])
        self.norm = nn.LayerNorm(width, sizes.eps)
        self.head = nn.Linear(width, sizes.num_classes) if sizes.num_classes else None
        self.register_buffer("table", torch.empty(sizes.in_chans, 256), persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return logits (B, K) float32 of pixel values (B, C, H, W)."""
        if self.head is None:
            raise ModelError("the model has no classification head; use it for embeddings")
        x = self._embed_patches(pixel_values)
        *early, last = self.blocks
        for block in early:
            x = block(x)
        x = self.norm(last(x, only_class=True))[:, 0]
        return self.head(x).float()  # type: ignore[no-any-return]

    def features(
        self, pixel_values: torch.Tensor, layers: Sequence[int], pooling: str, norm: bool
    ) -> torch.Tensor:
        """Return pooled tokens (B, D times layers) float32 after each of the layers.

        Args:
            pixel_values: (B, C, H, W).
            layers: numbers of blocks passed through, ascending; 0 is before the first.
            pooling: "cls" or "mean", of the patches.
            norm: apply the final LayerNorm to each.
        """
        x = self._embed_patches(pixel_values)
        found = [self._pool(x, pooling, norm)] if layers[0] == 0 else []
        for number, block in enumerate(self.blocks[: layers[-1]], start=1):
            x = block(x, only_class=pooling == "cls" and number == layers[-1])
            if number in layers:
                found.append(self._pool(x, pooling, norm))
        return torch.cat(found, dim=1)

    def pixel_values(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return pixel values (B, C, H, W) of pixels (B, H, W, C) uint8, by the table."""
        channels = [
            values[level.int()] for values, level in zip(self.table, pixels.unbind(-1), strict=True)
        ]
        return torch.stack(channels, dim=1)

    def _embed_patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)  # (B, T - 1, D)
        cls_token = self.cls_token.expand(len(patches), -1, -1)
        return torch.cat([cls_token, patches], dim=1) + self.pos_embed

    def _pool(self, x: torch.Tensor, pooling: str, norm: bool) -> torch.Tensor:
        if norm:
            x = self.norm(x)
        return (x[:, 0] if pooling == "cls" else x[:, 1:].mean(dim=1)).float()


def build(sizes: Architecture, weights: Mapping[str, torch.Tensor], table: torch.Tensor) -> Vit:
    """Return the network with these weights in fp32, ready to infer.

    Args:
        sizes: its architecture.
        weights: by canonical name.
        table: (C, 256) of the preprocessing.

    Raises:
        ModelError: a tensor is missing, too many, or of another shape.
    """
    ensure_complete(sizes, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    with torch.device("meta"):
        network = Vit(sizes)
    network.load_state_dict({n: t.float() for n, t in weights.items()}, assign=True, strict=True)
    network.table = table
    return network.eval().requires_grad_(False)


def ensure_complete(sizes: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights that are not exactly those of the architecture.

    Raises:
        ModelError: names what is missing, too many or of another shape.
    """
    wanted = sizes.shapes()
    missing = sorted(wanted.keys() - shapes.keys())
    extra = sorted(shapes.keys() - wanted.keys())
    wrong = [
        f"{name} is {shapes[name]}, not {shape}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    faults = [("missing", missing), ("too many", extra), ("of another shape", wrong)]
    said = [f"{len(found)} {kind}: {', '.join(found[:3])}" for kind, found in faults if found]
    if said:
        raise ModelError(f"the weights do not fit the model's config.json: {'; '.join(said)}")
