from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from colabtools import micro, registry
from colabtools.dreambooth.cache import LatentCache, load_pixels
from colabtools.dreambooth.models import load_pipeline
from colabtools.errors import TrainingError

PHOTOS = sorted(micro.subject_path().glob("*.png"))


@pytest.fixture(scope="module")
def vae() -> torch.nn.Module:
    return load_pipeline(registry.BASES["micro"]).vae.requires_grad_(False)


def test_pixels_are_in_the_range_that_the_autoencoder_knows(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (0, 255, 127)).save(tmp_path / "a.png")
    pixels = load_pixels([tmp_path / "a.png"])
    assert (pixels.shape, pixels.dtype) == ((1, 3, 8, 8), torch.float32)
    assert pixels[0, :2, 0, 0].tolist() == [-1.0, 1.0]
    assert abs(pixels[0, 2, 0, 0].item()) < 0.005


def test_sampling_the_cache_is_sampling_the_encoder(vae: torch.nn.Module) -> None:
    cache = LatentCache.encode(vae, PHOTOS, desc="test")
    rows = torch.tensor([3, 0])
    cached = cache.sample(rows, torch.Generator().manual_seed(7))
    posterior = vae.encode(load_pixels([PHOTOS[3], PHOTOS[0]])).latent_dist
    uncached = posterior.sample(torch.Generator().manual_seed(7)) * vae.config.scaling_factor
    assert len(cache) == 5
    torch.testing.assert_close(cached, uncached, atol=1e-5, rtol=1e-5)


def test_each_draw_differs_by_the_posteriors_deviation(vae: torch.nn.Module) -> None:
    cache = LatentCache.encode(vae, PHOTOS[:1], desc="test")
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([cache.sample(torch.tensor([0]), generator) for _ in range(400)])
    torch.testing.assert_close(draws.mean(0), cache.mean[0], atol=0.05, rtol=0)
    assert ((draws.std(0) / cache.std[0]) - 1).abs().mean() < 0.1


def test_a_latent_that_is_not_finite_names_its_picture(vae: torch.nn.Module) -> None:
    broken = load_pipeline(registry.BASES["micro"]).vae.requires_grad_(False)
    broken.quant_conv.bias[0] = float("nan")
    with pytest.raises(TrainingError, match=r"1\.png encodes to numbers that are not finite"):
        LatentCache.encode(broken, PHOTOS[:1], desc="test")
