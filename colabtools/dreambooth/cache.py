"""What the frozen VAE says of every picture, computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from colabtools import images
from colabtools.errors import TrainingError
from colabtools.report import progress

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from diffusers import AutoencoderKL

__all__ = ["LatentCache", "load_pixels"]


@dataclass(frozen=True)
class LatentCache:
    """Mean and standard deviation of each picture's scaled latents, (N, C, h, w) float32.

    Sampling from them at each step is what encoding at each step would give.
    """

    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    @torch.no_grad()
    def encode(cls, vae: AutoencoderKL, paths: Sequence[Path], *, desc: str) -> LatentCache:
        """Encode square pictures of one size.

        Raises:
            ImageError: a picture cannot be decoded.
            TrainingError: a latent is not finite.
        """
        means, stds = [], []
        for path in progress(paths, desc=desc, unit="pictures"):
            posterior = vae.encode(load_pixels([path]).to(vae.device)).latent_dist
            means.append(posterior.mean)
            stds.append(posterior.std)
            if not bool(posterior.mean.isfinite().all()):
                raise TrainingError(
                    f"{path.name} encodes to numbers that are not finite; replace the picture"
                )
        factor = vae.config.scaling_factor
        return cls(torch.cat(means) * factor, torch.cat(stds) * factor)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.mean)

    def sample(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return latents (B, C, h, w) drawn from the posteriors of these pictures."""
        noise = torch.randn(self.mean[rows].shape, generator=generator).to(self.mean.device)
        return self.mean[rows] + self.std[rows] * noise


def load_pixels(paths: Sequence[Path]) -> torch.Tensor:
    """Return pictures as pixel_values (B, 3, H, W) float32 in [-1, 1]."""
    pictures = np.stack([np.asarray(images.load_upright(path)) for path in paths])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
