"""The noise that a latent is mixed with."""

from __future__ import annotations

import torch

__all__ = ["offset_noise"]


def offset_noise(
    noise: torch.Tensor, strength: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return the noise with one random number added to all pixels of each channel.

    White noise hardly moves a picture's mean brightness, so a model trained on it alone cannot draw
    very dark or very bright pictures; the offset makes the mean a part of what is learned. Pixels
    of one channel then have variance 1 + strength^2 and covariance strength^2.

    Source: Guttenberg 2023, "Diffusion with Offset Noise", crosslabs.org.

    Args:
        noise: (C, h, w) of one example, or (B, C, h, w).
        strength: standard deviation of the offset, 0.1 in the source. At 0 nothing is drawn from
            the generator.
        generator: of the offset.
    """
    if strength == 0:
        return noise
    device = noise.device if generator is None else generator.device
    offset = torch.randn((*noise.shape[:-2], 1, 1), generator=generator, device=device)
    return noise + strength * offset.to(noise.device, noise.dtype)
